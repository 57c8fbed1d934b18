"""Rewards for users: open any run, adapter or export in one call; score, rank, pick the best of n."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rm.checkpoint import RunFolder
from lora_rm.data.preference import Message, Messages
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import DataError, ModelError
from lora_rm.model.record import RECORD
from lora_rm.model.reward_model import RewardModel

if TYPE_CHECKING:
    from lora_rm.export.gguf import GGUFModel


def load_reward_model(path: str | Path, *, device: str = "auto", compute_dtype: str = "auto") -> "Scorer":
    """Opens a reward model.

    Args:
        path: A run folder (its adapter is opened on the quantised base), an adapter, a merged model, an export, or
            a `.gguf` file of one, which llama.cpp computes.
        device: auto, cpu, cuda, ...
        compute_dtype: auto, float32, bfloat16 or float16; not of a `.gguf` file, which is computed as it is stored.

    Raises:
        ModelError: If the folder is none of these, or its head is missing or has not one logit.
    """
    folder = Path(path)
    gguf = folder if folder.suffix == ".gguf" else folder / "model.gguf"
    if gguf.is_file():
        from lora_rm.export.gguf import GGUFModel

        return Scorer(GGUFModel(gguf, device=device))
    if (folder / "config.yaml").is_file():
        folder = RunFolder.open(folder).trained()
    if (folder / RECORD).is_file():
        model = RewardModel.load_adapter(folder, device=device, compute_dtype=compute_dtype)
    elif (folder / "config.json").is_file():
        model = RewardModel.load_merged(folder, device=device, compute_dtype=compute_dtype)
    else:
        raise ModelError(
            f"{path}: is no run, adapter, merged model or export of lora_rm. Give one of these folders."
        )
    model.choose_batching()
    return Scorer(model.eval())


def reward_function(
    path: str | Path, *, device: str = "auto", compute_dtype: str = "auto"
) -> Callable[..., list[float]]:
    """A function that TRL's GRPOTrainer and RLOOTrainer take in `reward_funcs`.

    >>> trainer = GRPOTrainer(model, reward_funcs=reward_function("runs/quickstart"), ...)  # doctest: +SKIP

    Args:
        path: As in `load_reward_model`.
        device: As in `load_reward_model`.
        compute_dtype: As in `load_reward_model`.

    Returns:
        `reward(prompts, completions, **columns) -> list[float]`. Prompts and completions are lists of messages, or
        texts: a text is taken as one user message, or one assistant message. Columns of the data and TRL's own
        (`completion_ids` are of the policy's tokenizer) are not used.

    Raises:
        ModelError: As `load_reward_model` does.
    """
    scorer = load_reward_model(path, device=device, compute_dtype=compute_dtype)

    def reward(
        prompts: Sequence[str | Sequence[Message]], completions: Sequence[str | Sequence[Message]], **_: Any
    ) -> list[float]:
        """Rewards of completions, each of its own prompt."""
        pairs = zip(prompts, completions, strict=True)
        return scorer.score_conversations(
            [
                (*_messages(prompt, "user"), *_messages(completion, "assistant"))
                for prompt, completion in pairs
            ]
        )

    return reward


class Scorer:
    """A reward model that takes text.

    >>> scorer = load_reward_model("runs/quickstart")  # doctest: +SKIP
    >>> scorer.score("What is 2 + 2?", ["4", "Paris"])  # doctest: +SKIP
    [3.1, -2.7]
    """

    def __init__(self, model: "RewardModel | GGUFModel") -> None:
        """Wraps an opened model; `load_reward_model` does it."""
        self.model: Any = model

    def score(
        self, prompt: str | Sequence[Message], answers: Sequence[str | Sequence[Message]]
    ) -> list[float]:
        """Rewards of K answers to one prompt.

        Args:
            prompt: A text, taken as one user message, or messages.
            answers: Texts, taken as assistant messages, or lists of messages.
        """
        return self.score_conversations(self.conversations(prompt, answers))

    def score_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """Rewards of whole conversations; those that begin alike are not told apart from others.

        Raises:
            DataError: If one is empty or ends with no assistant message.
        """
        return self.score_ids(self.ids(conversations))

    @staticmethod
    def conversations(
        prompt: str | Sequence[Message], answers: Sequence[str | Sequence[Message]]
    ) -> list[Messages]:
        """The conversations of a prompt with each of its answers; see `score`."""
        before = _messages(prompt, "user") if prompt else ()
        return [(*before, *_messages(answer, "assistant")) for answer in answers]

    def ids(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Token ids of whole conversations.

        Raises:
            DataError: If one is empty or ends with no assistant message.
        """
        for number, conversation in enumerate(conversations):
            if not conversation or conversation[-1]["role"] != "assistant":
                raise DataError(
                    f"conversation {number}: does not end with an assistant message, so there is no answer to score."
                )
        rows: list[list[int]] = self.model.chat.ids([(tuple(one), ()) for one in conversations])
        return rows

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of whole conversations given as token ids.

        Raises:
            ModelError: If one is not finite.
        """
        trees = [TokenTree(list(row[:-1]), (list(row[-1:]),), kind="rating", scores=(0.0,)) for row in rows]
        rewards = [rewards[0] for rewards in self.model.score(trees)]
        if not all(map(math.isfinite, rewards)):
            raise ModelError(
                "A reward is not finite. If its products are in float16, they overflowed: open the model with compute_dtype "
                "float32 or bfloat16. If not, look at it with `lora-rm doctor`."
            )
        return rewards

    def rank(self, prompt: str | Sequence[Message], answers: Sequence[str | Sequence[Message]]) -> list[int]:
        """Indices of the answers, best first."""
        rewards = self.score(prompt, answers)
        return sorted(range(len(answers)), key=lambda number: rewards[number], reverse=True)

    def best_of(self, prompt: str | Sequence[Message], answers: Sequence[str]) -> str:
        """The answer with the highest reward.

        Raises:
            DataError: If there is none to choose from.
        """
        if not answers:
            raise DataError("best_of needs at least one answer.")
        return answers[self.rank(prompt, answers)[0]]


def _messages(text: str | Sequence[Message], role: str) -> Messages:
    return ({"role": role, "content": text},) if isinstance(text, str) else tuple(text)
