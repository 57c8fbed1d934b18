"""The training loop."""

import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import is_initialized
from accelerate.utils import set_seed
from transformers import get_scheduler

from lora_rm import processes
from lora_rm.checkpoint import (
    RunFolder,
    changed_versions,
    find_fault,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    remove_old,
    save_checkpoint,
    set_aside,
)
from lora_rm.config import Settings, flat
from lora_rm.console import say
from lora_rm.data.batches import (
    Batching,
    Core,
    TreeBatch,
    build_batch,
    microbatches,
    prefetched,
    shares_of_rows,
    training_order,
)
from lora_rm.data.split import Data
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import ConfigError, Interrupted, ModelError, first_line
from lora_rm.evaluate import evaluate
from lora_rm.losses import preference_losses
from lora_rm.metrics import MetricsLog, StepSums, memory_gib, sum_steps
from lora_rm.model.device import is_out_of_memory
from lora_rm.model.quantization import DTYPES, dtype_name
from lora_rm.model.reward_model import RewardModel


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers beside tensors."""

    step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    changed_base: str = ""
    """Hash of what adapter.init pissa or olora took out of the base."""
    row: int = 0
    """Tokens of a microbatch since the device ran out of memory; 0: as it was set."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the loss scale of float16 products; empty for other types."""
    core: str = ""
    """How the attention of shared prompts was computed: another way would round otherwise."""
    compute_dtype: str = ""
    """Of the products."""


class _Optimization(NamedTuple):
    """What makes a step out of gradients."""

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


class _Step(NamedTuple):
    number: int
    num_preferences: int
    batches: list[TreeBatch]
    """This process' share of the rows."""
    num_idle: int
    """Rows by which another process has more."""
    can_be_cut: bool
    """Whether a row of any process holds more than one preference."""


def train(
    model: RewardModel, data: Data, settings: Settings, run: RunFolder, *, resume: bool = False
) -> Progress:
    """Trains adapter and head.

    At every step the preferences of `training_order` are cut into rows of at most `tokens_per_microbatch`
    tokens; the losses add up to their mean over the step. Several processes share a step's rows and sum their
    gradients. With `eval_every_steps` the best state by evaluation loss is kept and put back at the end. A step
    for which the device has too little memory is repeated with rows of half the tokens.

    Args:
        model: With trainable adapter and head; trained in place.
        data: Both sides; the evaluation side is used with `eval_every_steps` only.
        settings: Of the run.
        run: Where metrics and checkpoints go.
        resume: Go on from the newest whole checkpoint.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM, when a checkpoint is saved.
        ModelError: If `max_skipped_steps` steps in a row had a non-finite loss or gradient, rows of a single
            preference do not fit the device, or the best state was damaged meanwhile.
        StorageError: If the disk is full; earlier checkpoints are whole.
        ConfigError: If a setting needs hardware that is not here.
    """
    wanted = settings.train
    run.begin()
    num_steps = count_steps(len(data.train.trees), settings)
    accelerator = _trackers(settings, model.device)
    optimization = _optimization(model, settings, num_steps)
    begun_with = model.changed_base.sha256 if model.changed_base else ""
    progress = Progress(changed_base=begun_with)
    if resume:
        progress = _resume(model, optimization, run) or progress
    progress.compute_dtype = _one_dtype(model, settings, progress.compute_dtype)
    progress.core = _one_core(model, progress.core)
    if any(other != progress.changed_base for other in processes.gather(begun_with)):
        raise ModelError(
            f"adapter.init {settings.adapter.init} took something else out of the base here than when {run.path} "
            "was begun, or than in another process. Go on with the machine and the libraries it was begun with."
        )
    if settings.adapter.init == "eva" and not progress.step:
        model.start_from_data(data.train.trees, wanted.row)
    processes.copy_from_first(optimization.parameters)
    if not progress.step:  # whether the evaluation before was skipped must not matter
        set_seed(_seed(settings.seed, 0, 0))
    metrics = MetricsLog(
        run.metrics,
        num_steps,
        first_step=progress.step,
        every=wanted.log_every_steps,
        accelerator=accelerator,
    )

    def save(name: str) -> None:
        if not processes.IS_FIRST:
            return
        metrics.flush()
        save_checkpoint(
            run.checkpoints / name,
            model=model,
            optimizer=optimization.optimizer,
            scheduler=optimization.scheduler,
            progress=asdict(progress),
        )
        remove_old(run.checkpoints, wanted.keep_checkpoints, progress.best_step)

    if 0 < progress.best_step == progress.step and find_fault(run.checkpoints / f"best-{progress.step:06d}"):
        save(f"best-{progress.step:06d}")  # what the run goes on from is that state

    model.train()
    with metrics.display(), _stop_signals() as stop, _sums_in_order(model):
        for own in _steps(model, data, settings, progress, num_steps):
            found = _take_step(model, own, settings, progress, optimization)
            if found is None:
                continue
            step = progress.step = own.number
            metrics.step(step, found)
            if wanted.eval_every_steps and (step % wanted.eval_every_steps == 0 or step == num_steps):
                _evaluate(model, data, settings, metrics, progress)
                if progress.best_step == step:
                    save(f"best-{step:06d}")
            # one answer for all; a signal that comes later counts at the next step
            is_stopping = any(processes.gather(stop.requested))
            # the last one too: the evaluation and the adapter that follow may be interrupted as well
            is_last = step == num_steps or _is_enough(progress, settings)
            if is_stopping or (wanted.save_every_steps and (step % wanted.save_every_steps == 0 or is_last)):
                save(f"step-{step:06d}")
            if is_stopping:
                processes.wait()  # a process that left now would take the first one down while it writes
                raise Interrupted(
                    f"Stopped at step {step} of {num_steps}; nothing is lost. "
                    f"Go on with `lora-rm train {run.config} --resume`."
                )
            if _is_enough(progress, settings):
                say(f"No better evaluation since step {progress.best_step}: training stops at step {step}.")
                break
    if progress.best_step:
        _put_best_back(model, run, progress)
    for tracker in accelerator.trackers:  # end_training would part the processes too
        tracker.finish()
    return progress


def _take_step(
    model: RewardModel, step: _Step, settings: Settings, progress: Progress, optimization: _Optimization
) -> dict[str, Any] | None:
    """An optimizer step of all processes together; its numbers, or None if a device had too little memory.

    Raises:
        ModelError: If `max_skipped_steps` steps in a row had a non-finite loss or gradient.
    """
    wanted, started = settings.train, time.monotonic()
    parameters, optimizer, scheduler, scaler = optimization
    if processes.count() > 1:
        # dropout of this step in this process, whatever was drawn before: a checkpoint holds one state only
        torch.manual_seed(_seed(settings.seed, step.number, processes.rank()))
    rate = scheduler.get_last_lr()[0]
    own = _gradients(model, step.batches, step.num_preferences, settings, scaler)
    model.idle(step.num_idle)
    parts = [part for part in processes.gather(own) if part is not None]
    if len(parts) < processes.count():
        optimizer.zero_grad(set_to_none=True)
        return None
    sums = sum_steps(parts)
    processes.sum_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = _gradient_norm(parameters, wanted.max_grad_norm)
    if math.isfinite(sums.loss) and math.isfinite(norm):
        optimizer.step()
        progress.skipped_in_a_row = 0
    elif scaler.is_enabled() and math.isfinite(sums.loss) and scaler.get_scale() > 1.0:
        progress.num_skipped += 1  # how the scale is found: it is halved now
        scale = f"{scaler.get_scale():.0f}"
        say(f"Step {step.number} is skipped: its gradient overflows with a loss scale of {scale}.")
    else:
        _count_skipped(progress, step.number, sums, norm, model, wanted.max_skipped_steps)
    scaler.update()
    progress.scaler = scaler.state_dict()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - started
    return {
        **sums.to_json(),
        "grad_norm": norm if math.isfinite(norm) else None,
        "learning_rate": rate,
        "num_preferences": step.num_preferences,
        "num_tokens": sums.num_tokens,
        "num_skipped": progress.num_skipped,
        "seconds": seconds,
        "tokens_per_second": sums.num_tokens / seconds,
        "memory_gib": memory_gib(model.device),
        "tokens_per_microbatch": progress.row or wanted.row,
    }


def _put_best_back(model: RewardModel, run: RunFolder, progress: Progress) -> None:
    """Loads the state of the lowest evaluation loss.

    Raises:
        ModelError: If it was damaged meanwhile.
    """
    processes.wait()
    best = run.checkpoints / f"best-{progress.best_step:06d}"
    if fault := find_fault(best):
        raise ModelError(
            f"{best}: the best state cannot be put back, since {fault}. Go on with `lora-rm train {run.config} --resume`, "
            "which trains again from the newest checkpoint that does not need it."
        )
    load_weights(best, model)
    if progress.best_step < progress.step:
        say(
            f"The weights of step {progress.best_step} of {progress.step} are put back: there the evaluation loss was lowest, "
            f"{progress.best_loss:.4f}."
        )


def count_steps(num_preferences: int, settings: Settings) -> int:
    """Optimizer steps of a run, at least one; an epoch's last step may be smaller than the others."""
    per_epoch = math.ceil(num_preferences / settings.train.preferences_per_step)
    steps = max(1, round(per_epoch * settings.train.num_epochs))
    return min(steps, settings.train.max_steps) if settings.train.max_steps else steps


def _optimization(model: RewardModel, settings: Settings, num_steps: int) -> _Optimization:
    wanted = settings.train
    optimizer = build_optimizer(model, settings)
    # the first step of a warm-up has the rate 0: a run of one step has none, or it would train nothing
    num_warmup = round(wanted.warmup_share * num_steps) if num_steps > 1 else 0
    # transformers' plain "constant" has no warm-up
    schedule = "constant_with_warmup" if wanted.schedule == "constant" else wanted.schedule
    return _Optimization(
        parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        scheduler=get_scheduler(schedule, optimizer, num_warmup, num_steps),
        scaler=_loss_scale(model),
    )


def build_optimizer(model: RewardModel, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; the B matrices have a rate of their own with LoRA+.

    Raises:
        ConfigError: If the optimizer needs a GPU and there is none.
    """
    wanted = settings.train
    own_rate = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    fast = {id(p) for p in own_rate} if settings.adapter.lora_plus_ratio != 1.0 else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in fast]},
    ]
    if fast:
        groups.append({"params": own_rate, "lr": wanted.learning_rate * settings.adapter.lora_plus_ratio})
    arguments: dict[str, Any] = {
        "lr": wanted.learning_rate,
        "betas": (wanted.adam_beta1, wanted.adam_beta2),
        "weight_decay": wanted.weight_decay,
    }
    if wanted.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    if model.device.type != "cuda":
        raise ConfigError(
            f"train.optimizer is paged_adamw_8bit, which needs a GPU; the model is on {model.device}. Use adamw."
        )
    import bitsandbytes as bnb

    return bnb.optim.PagedAdamW8bit(groups, **arguments)


def _steps(
    model: RewardModel, data: Data, settings: Settings, progress: Progress, num_steps: int
) -> Iterator[_Step]:
    """Every step left; one that was not done comes again, with rows of half the tokens.

    Raises:
        ModelError: If a step was not done although every row is a single preference.
    """
    while progress.step < num_steps and not _is_enough(progress, settings):
        row = progress.row or settings.train.row
        for step in prefetched(_rows(model, data, settings, progress.step, num_steps, row)):
            yield step
            if progress.step == step.number:
                continue
            if not step.can_be_cut:
                raise ModelError(
                    f"Step {step.number} needs more memory than {model.device} has, with one preference a row. Lower "
                    "data.max_length or adapter.rank, or set train.checkpointing full; `lora-rm plan` tells what fits."
                )
            progress.row = row // 2
            say(
                f"Step {step.number} needs more memory than {model.device} has with rows of {row} tokens. It is repeated, "
                f"and training goes on, with rows of {progress.row}."
            )
            break


def _rows(
    model: RewardModel, data: Data, settings: Settings, done: int, num_steps: int, budget: int
) -> Iterator[_Step]:
    """Every step after the first `done`, cut into rows of at most `budget` tokens."""
    found = rows_of_steps(data.train.trees, settings, num_steps, model.batching, budget, done)
    for step, rows in enumerate(found, start=done + 1):
        shares = shares_of_rows(rows, model.batching, processes.count())
        own = shares[processes.rank()]
        num_idle = max(map(len, shares)) - len(own)
        can_be_cut = any(len(row) > 1 for row in rows)
        num_preferences = sum(map(len, rows))
        batches = [build_batch(row, model.batching, model.core) for row in own]
        if model.device.type == "cuda":  # so that copies wait for nothing
            batches = [batch.pin() for batch in batches]
        yield _Step(step, num_preferences, batches, num_idle, can_be_cut)


def rows_of_steps(
    trees: Sequence[TokenTree],
    settings: Settings,
    num_steps: int,
    batching: Batching,
    budget: int,
    done: int = 0,
) -> Iterator[list[list[TokenTree]]]:
    """The rows of at most `budget` tokens into which the preferences of every step after the first `done` are cut."""
    groups = [tree.group for tree in trees]
    order = training_order(len(trees), num_steps, settings.train.preferences_per_step, settings.seed, groups)
    for numbers in islice(order, done, None):
        yield microbatches([trees[number] for number in numbers], budget, batching, processes.count())


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "big")


def _gradients(
    model: RewardModel,
    batches: Sequence[TreeBatch],
    num_preferences: int,
    settings: Settings,
    scaler: torch.amp.GradScaler,
) -> StepSums | None:
    """Adds up the gradients of a step's mean loss; None if the device has too little memory.

    The random states are then those from before, so that the repeated step draws the same dropout.
    """
    sums = StepSums()

    def add(batch: TreeBatch) -> None:  # a function, so that what a failed step held goes with it
        batch = batch.to(model.device)
        rewards = model.rewards(batch)
        losses = preference_losses(rewards, batch.preferences, settings.loss)
        sums.add(batch.preferences, losses.detach(), rewards.detach().tolist(), batch.input_ids.numel())
        scaler.scale(losses.sum() / num_preferences).backward()

    on_gpu = model.device.type == "cuda"
    before = torch.get_rng_state(), torch.cuda.get_rng_state(model.device) if on_gpu else None
    try:
        for batch in batches:
            add(batch)
        return sums
    except RuntimeError as error:
        # sharded: the other processes wait for this one's part of the weights
        if model.is_sharded or not is_out_of_memory(error):
            raise
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1], model.device)
    # outside of the handler, whose traceback holds the tensors of the step
    if on_gpu:
        torch.cuda.empty_cache()
    return None


def _loss_scale(model: RewardModel) -> torch.amp.GradScaler:
    """Of float16 products, where small gradients would be 0 (Micikevicius et al. 2018, arXiv 1710.03740, sec. 3.2)."""
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.compute_dtype == torch.float16)
    # makes the scale, also in a process that will have no row
    scaler.scale(torch.zeros((), device=model.device))
    return scaler


def _gradient_norm(parameters: list[torch.nn.Parameter], highest: float) -> float:
    """The norm of all gradients, which are scaled down to `highest` if that is not 0."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, highest or math.inf))


def _count_skipped(
    progress: Progress, step: int, sums: StepSums, norm: float, model: RewardModel, allowed: int
) -> None:
    progress.num_skipped += 1
    progress.skipped_in_a_row += 1
    say(f"Step {step} is skipped: its loss is {sums.loss / sums.num_preferences}, its gradient norm {norm}.")
    if progress.skipped_in_a_row < allowed:
        return
    largest = max((abs(r) for r in sums.rewards if math.isfinite(r)), default=math.nan)
    not_finite = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    raise ModelError(
        f"{allowed} steps in a row had a non-finite loss or gradient (last: step {step}; largest finite reward "
        f"{largest:.3g}; parameters that are not finite: {not_finite[:3] or 'none'}). "
        "Lower train.learning_rate, or set model.compute_dtype to bfloat16 or float32."
    )


def _evaluate(
    model: RewardModel, data: Data, settings: Settings, metrics: MetricsLog, progress: Progress
) -> None:
    """Evaluates, and remembers whether it is the best so far."""
    found = evaluate(model, data.eval.trees, settings.loss, progress.row or settings.train.row)
    low, high = found.interval
    say(
        f"evaluation at step {progress.step}: loss {found.loss:.4f}, accuracy {found.pairs.accuracy:.3f} [{low:.3f}, {high:.3f}]"
    )
    metrics.evaluation(
        progress.step, {"loss": found.loss, "accuracy": found.pairs.accuracy, "margin": found.margin_mean}
    )
    if found.loss < (math.inf if progress.best_loss is None else progress.best_loss):  # never NaN
        progress.best_loss, progress.best_step, progress.evaluations_since_best = found.loss, progress.step, 0
    else:
        progress.evaluations_since_best += 1


def _is_enough(progress: Progress, settings: Settings) -> bool:
    """Whether so many evaluations brought nothing better that training stops."""
    allowed = settings.train.early_stopping
    return bool(allowed) and progress.evaluations_since_best >= allowed


def _resume(model: RewardModel, optimization: _Optimization, run: RunFolder) -> Progress | None:
    """Loads the newest whole checkpoint, if there is one."""
    checkpoint, passed_over = newest_checkpoint(run.checkpoints)
    for sentence in passed_over:
        say(sentence)
    processes.wait()  # until all have looked
    if processes.IS_FIRST:
        set_aside(run.checkpoints, checkpoint)
    if checkpoint is None:
        found = "No checkpoint can be used" if passed_over else "There is no checkpoint yet"
        say(f"{found}: training starts at the first step.")
        return None
    say(f"Going on from {checkpoint}.")
    if changed := changed_versions(checkpoint):
        say(
            f"It was saved with other libraries ({'; '.join(changed)}): what comes is as good, but not the same bit for bit. "
            "For that, install those versions again."
        )
    _, optimizer, scheduler, scaler = optimization
    progress = Progress(**load_checkpoint(checkpoint, model=model, optimizer=optimizer, scheduler=scheduler))
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    return progress


def _trackers(settings: Settings, device: torch.device) -> Accelerator:
    """An accelerator that holds the trackers; what `accelerate config` says of types and devices is not used."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        # another trainer of this process may have set a type, which cannot be changed: nothing here is computed in it
        mixed_precision=None if is_initialized() else "no",
        log_with=list(settings.train.trackers) or None,
        project_dir=settings.output_dir,
    )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise ConfigError(
            f"accelerate was launched for {accelerator.distributed_type.value}; several processes share the data here, "
            "each with the whole base or, with train.sharding full, a part of it. Launch with torchrun, or accelerate launch "
            "--multi_gpu."
        )
    if settings.train.trackers:
        accelerator.init_trackers(
            os.environ.get("WANDB_PROJECT", "lora_rm")
            if settings.train.trackers == ("wandb",)
            else "lora_rm",
            config={
                key: value if isinstance(value, int | float | str) else str(value)
                for key, value in flat(settings).items()
            },
            init_kwargs={name: {"name": Path(settings.output_dir).name} for name in ("wandb", "trackio")},
        )
    return accelerator


def _one_dtype(model: RewardModel, settings: Settings, earlier: str) -> str:
    """The type of products of all processes: where it is chosen by the hardware, that of the first one, or of the run that goes on."""
    own = dtype_name(model.compute_dtype)
    if settings.model.compute_dtype != "auto":
        return own
    wanted: str = processes.gather(earlier or own)[0]
    if wanted != own:
        say(
            f"Products are computed in {wanted}, as {'where this run was begun' if earlier else 'by the first process'}; "
            f"this device would choose {own}."
        )
        model.set_compute_dtype(DTYPES[wanted])
    return wanted


def _one_core(model: RewardModel, earlier: str) -> Core:
    """The attention core that all processes use: that of the first one, or of the run that goes on.

    Cores round differently, and which is the fastest may change from day to day and from card to card.
    """
    wanted = cast("Core", processes.gather(earlier or model.core)[0])
    if not all(processes.gather(wanted in model.exact_cores())):
        say(
            f"Attention was computed with the core {wanted}, which cannot be used here: what comes may differ in its last bits."
        )
        wanted = "answers"
    model.set_core(wanted)
    return wanted


@contextmanager
def _sums_in_order(model: RewardModel) -> Iterator[None]:
    """Makes a GPU add up what its threads find in one order, so that the same step gives the same bits again.

    Flash attention's gradients are otherwise sums in the order in which blocks happen to end.
    """
    if model.device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch below 2.13 may ask for it
    how: Any = torch.utils.deterministic
    before, filled = torch.get_deterministic_debug_mode(), how.fill_uninitialized_memory
    how.fill_uninitialized_memory = False  # writes every new tensor once more, to find mistakes
    torch.set_deterministic_debug_mode("error")  # a mere warning leaves flash attention as it was
    try:
        try:
            _try_step(model)
        except RuntimeError as error:
            say(
                f"A resumed run will not be the same bit for bit, since this model computes what has no fixed order on a GPU "
                f"({first_line(error, 120)})."
            )
            torch.set_deterministic_debug_mode(before)
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        how.fill_uninitialized_memory = filled


def _try_step(model: RewardModel) -> None:
    """Runs a tiny forward and backward pass that leaves no trace."""
    with torch.random.fork_rng([model.device]):
        try:
            model.rewards(model.batch([TokenTree([0] * 8, ([1], [0]))])).sum().backward()
        finally:
            model.zero_grad(set_to_none=True)
            model.forget_pass()


@dataclass(slots=True)
class _Stop:
    requested: bool = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Notes Ctrl-C and SIGTERM so that the loop can save first; a second Ctrl-C stops at once."""
    stop = _Stop()

    def note(number: int, frame: object) -> None:
        del frame
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True
        say(
            "Stopping after this step; a second Ctrl-C stops at once and loses the steps since the last checkpoint."
        )

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not in the main thread, where Python allows no handlers
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
