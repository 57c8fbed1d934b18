"""Rewards for users: open any run, adapter or export in one call; score, rank, pick the best of n."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rm.checkpoint import RunFolder
from lora_rm.data.conversations import read_answer, read_conversation, read_messages, read_prompt
from lora_rm.data.fields import check_objects, check_text, read_tools, wrong_type
from lora_rm.data.preference import Message, Messages
from lora_rm.data.tokens import Conversation, TokenTree
from lora_rm.errors import DataError, ModelError
from lora_rm.evaluate import check_finite
from lora_rm.export import TARGETS
from lora_rm.model.base import is_hub_id, read_json
from lora_rm.model.record import RECORD
from lora_rm.model.reward_model import RewardModel

if TYPE_CHECKING:
    from lora_rm.export.gguf_model import GGUFModel


def load_reward_model(path: str | Path, *, device: str = "auto", compute_dtype: str = "auto") -> "Scorer":
    """Opens a reward model.

    Args:
        path: A run folder (its adapter is opened on the quantised base), an adapter, a merged model, an export, or
            a `.gguf` file of one, which llama.cpp computes; or the id of a reward model on the hub, like org/model,
            which is fetched.
        device: auto, cpu, cuda, ...
        compute_dtype: auto, float32, bfloat16 or float16; not of a `.gguf` file, which is computed as it is stored.
            float32 gives the rewards of parity.json; auto is bfloat16 for an adapter where the hardware has it.

    Raises:
        ModelError: If the path is none of these, the hub does not give it, or its head is missing or has not one logit.
    """
    folder = Path(path)
    gguf = folder if folder.suffix == ".gguf" else folder / "model.gguf"
    if gguf.is_file():
        from lora_rm.export.gguf_model import GGUFModel

        return Scorer(GGUFModel(gguf, device=device))
    if run := RunFolder.find(folder):
        folder = run.trained()
    if (folder / RECORD).is_file():
        model = RewardModel.load_adapter(folder, device=device, compute_dtype=compute_dtype)
    elif (folder / "config.json").is_file() or is_hub_id(str(path)):
        model = RewardModel.load_merged(folder, device=device, compute_dtype=compute_dtype)
    else:
        target = export_target(folder)
        if target:
            raise ModelError(
                f"{path}: is an export to {target}, which other programs open: its README.md tells how. Give the run or the "
                "merged model here."
            )
        raise ModelError(
            f"{path}: is no run, adapter, merged model or export of lora_rm. Give one of these folders, or the id of a reward "
            "model on the hub, like org/model."
        )
    model.choose_batching()
    return Scorer(model.eval())


def export_target(folder: Path) -> str | None:
    """What a folder was exported to (`lora_rm.export.TARGETS`), or None if it is no export."""
    file = folder / "parity.json"
    target = read_json(file).get("target") if file.is_file() else None
    return target if isinstance(target, str) else None


def reward_function(
    path: str | Path, *, name: str | None = None, device: str = "auto", compute_dtype: str = "auto"
) -> Callable[..., list[float | None]]:
    """A function that TRL's GRPOTrainer and RLOOTrainer take in `reward_funcs`.

    >>> trainer = GRPOTrainer(model, reward_funcs=reward_function("runs/quickstart"), ...)  # doctest: +SKIP

    Args:
        path: As in `load_reward_model`.
        name: Of the reward in TRL's metrics and tables; None: that of the run, the folder or the model on the hub.
        device: As in `load_reward_model`.
        compute_dtype: As in `load_reward_model`.

    Returns:
        `reward(prompts, completions, tools=None, **columns) -> list[float | None]`. Prompts and completions are lists of
        messages, or texts: a text is taken as one user message, or one assistant message; a completion may be empty, for
        a policy may write nothing. One that was cut after a tool's message has no answer, and its reward is None, which
        TRL takes for no reward. `tools` is a column of the data, as in training. Other columns, and TRL's own
        (`completion_ids` are of the policy's tokenizer), are not used.

    Raises:
        ModelError: As `load_reward_model` does. The function itself raises a DataError, for tools for instance that the
            model's template does not print: leave that column out then.
    """
    scorer = load_reward_model(path, device=device, compute_dtype=compute_dtype)

    def reward(
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[str | Sequence[Message]],
        tools: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of completions, each of its own prompt; what completions of one prompt share is computed once."""
        conversations: dict[int, Conversation] = {}
        groups = []
        shown = tools or [None] * len(prompts)
        for number, (prompt, completion, own) in enumerate(zip(prompts, completions, shown, strict=True)):
            before = read_prompt({f"prompts[{number}]": prompt}, f"prompts[{number}]")
            name = f"completions[{number}]"
            answer = (
                () if completion == [] else read_messages(completion, name, "assistant", may_be_empty=True)
            )
            if answer and answer[-1]["role"] == "assistant":
                conversations[number] = before + answer, read_tools({"tools": own or ()})
                groups.append(str(before))
        rewards = scorer.score_ids(scorer.model.chat.ids(list(conversations.values())), groups)
        found = dict(zip(conversations, rewards, strict=True))
        return [found.get(number) for number in range(len(prompts))]

    reward.__name__ = name or _own_name(path)  # by which TRL tells reward functions apart
    return reward


def _own_name(path: str | Path) -> str:
    """The last part of a model's path that tells it from others: that of `runs/mine/export/huggingface` is mine."""
    alike = {"adapter", "merged", "export", "model.gguf", *TARGETS}
    return next(part for part in reversed(Path(path).absolute().parts) if part not in alike)


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
        self,
        prompt: str | Sequence[Message],
        answers: Sequence[str | Sequence[Message]],
        *,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[float]:
        """Rewards of K answers to one prompt.

        Args:
            prompt: A text, taken as one user message, or messages.
            answers: Texts, taken as assistant messages, or lists of messages.
            tools: Definitions of tools that the chat template shows to the model.

        Raises:
            DataError: If a message is not as training reads it, or `answers` is one text.
        """
        if isinstance(answers, str | dict) or not isinstance(answers, Iterable):
            raise wrong_type("answers", answers, "a list of answers, of which one is a text or messages")
        before = read_prompt({"prompt": prompt}, "prompt") if prompt else ()
        after = [read_answer(answer, f"answers[{number}]") for number, answer in enumerate(answers)]
        rows = self.ids([before + answer for answer in after], tools)
        return self.score_ids(rows, ["answers"] * len(rows))

    def score_conversations(
        self, conversations: Sequence[Sequence[Message]], *, tools: Sequence[dict[str, Any]] = ()
    ) -> list[float]:
        """Rewards of whole conversations; those that begin alike are not told apart from others.

        Raises:
            DataError: If a message is not as training reads it, or a conversation ends with no assistant message.
        """
        read = [read_conversation(one, f"conversations[{n}]") for n, one in enumerate(conversations)]
        return self.score_ids(self.ids(read, tools))

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Rewards of conversations that are rendered already, as verl and OpenRLHF's remote reward function have them.

        No template is applied, and special tokens in the texts count; a BOS stands once, whether the texts have it or not.
        They must be rendered by this model's own chat template, for another's control tokens are mere text to its
        tokenizer, and to the end, for the reward is read at the last token: ChatML writes a line break after `<|im_end|>`,
        which what a policy has written lacks.

        >>> def reward_func(queries, prompts, labels, **_):  # in the file of OpenRLHF's --remote_rm_url  # doctest: +SKIP
        ...     rewards = torch.tensor(scorer.score_texts(queries))
        ...     return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

        Args:
            texts: Whole conversations, each ending with its answer.

        Raises:
            DataError: If one is no text or empty, or `texts` is one text.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise wrong_type("texts", texts, "a list of texts")
        return self.score_ids(
            self.model.chat.text_ids([check_text(text, f"texts[{n}]") for n, text in enumerate(texts)])
        )

    def ids(self, conversations: Sequence[Messages], tools: Sequence[dict[str, Any]] = ()) -> list[list[int]]:
        """Token ids of whole conversations, whose messages were read already.

        Raises:
            DataError: If one ends with no assistant message.
        """
        tools = check_objects(list(tools), "tools")
        for number, conversation in enumerate(conversations):
            if conversation[-1]["role"] != "assistant":
                raise DataError(
                    f"conversation {number}: does not end with an assistant message, so there is no answer to score."
                )
        rows: list[list[int]] = self.model.chat.ids([(one, tools) for one in conversations])
        return rows

    def score_ids(self, rows: Sequence[Sequence[int]], groups: Sequence[str] = ()) -> list[float]:
        """Rewards of whole conversations given as token ids.

        Args:
            rows: The conversations.
            groups: The group of each, "" for none of them; empty: no groups. What those of one group begin with is
                computed once.

        Raises:
            ModelError: If one is not finite.
        """
        trees = [
            TokenTree.of_conversation(row, group)
            for row, group in zip(rows, groups or [""] * len(rows), strict=True)
        ]
        rewards = [rewards[0] for rewards in self.model.score(trees)]
        check_finite(rewards)
        return rewards

    def rank(
        self,
        prompt: str | Sequence[Message],
        answers: Sequence[str | Sequence[Message]],
        *,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """Indices of the answers, best first."""
        rewards = self.score(prompt, answers, tools=tools)
        return sorted(range(len(answers)), key=lambda number: rewards[number], reverse=True)

    def best_of(
        self, prompt: str | Sequence[Message], answers: Sequence[str], *, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """The answer with the highest reward.

        Raises:
            DataError: If there is none to choose from.
        """
        if not answers:
            raise DataError("best_of needs at least one answer.")
        return answers[self.rank(prompt, answers, tools=tools)[0]]
