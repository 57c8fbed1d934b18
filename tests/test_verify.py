"""The fresh process that scores a folder: which GPU it sees, and that plain transformers is plain there."""

import pytest
from conftest import classifier
from transformers.models.llama import modeling_llama

from lora_rm.data.tokens import ChatTokenizer
from lora_rm.verify import _only, score_rows


@pytest.mark.parametrize(
    ("device", "known", "expected"),
    [
        ("auto", "2,3", {}),
        ("cuda", "2,3", {}),
        ("cpu", "2,3", {"CUDA_VISIBLE_DEVICES": ""}),
        ("cuda:1", "2,3", {"CUDA_VISIBLE_DEVICES": "3"}),
        ("cuda:1", "GPU-8932f937,GPU-5ac7", {"CUDA_VISIBLE_DEVICES": "GPU-5ac7"}),
        ("cuda:1", None, {"CUDA_VISIBLE_DEVICES": "1"}),
    ],
)
def test_a_fresh_process_sees_the_gpu_that_was_asked_for(monkeypatch, device, known, expected):
    """Numbers count among those that this process sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if known is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", known)
    assert _only(device) == expected


def test_plain_transformers_computes_with_its_own_rotary_positions(base, tmp_path):
    classifier(base).save_pretrained(tmp_path)
    ChatTokenizer.load(base).save(tmp_path)
    score_rows(tmp_path, [[1, 5, 9, 7, 3]], "merged")
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__
