"""The training loop. It reads as its own table of contents: whatever watches or adds is a hook."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from collie_core.best import BestModel
from collie_core.checkpoint.files import MODEL
from collie_core.checkpoint.run import Checkpoints, Follower
from collie_core.checkpoint.signals import Asked, attending
from collie_core.engine.step import LossFn, TrainFn, token_mean_loss
from collie_core.errors import RunError
from collie_core.evaluate.run import Evaluated, run_evaluators
from collie_core.evaluate.scoring import evaluating
from collie_core.export import put_trained, write_trained
from collie_core.generate import SampleText, sample_texts
from collie_core.guard import Guard
from collie_core.hang import Progress
from collie_core.hookspecs import Run
from collie_core.model.export import write_folder
from collie_core.parts import EvalFn, HandedIn, Parts
from collie_core.plan.out_of_memory import explained
from collie_core.plugins import check_agreement
from collie_core.report import (
    prepare_run_directory,
    refuse_used_directory,
    run_facts,
    run_identity,
    standard_observers,
)
from collie_core.report.meter import Meter
from collie_core.serving.beside import ServerBeside
from collie_core.storage import is_url
from collie_core.watch import watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from collie_core.config.evaluation import EvaluationConfig
    from collie_core.config.run import RunConfig
    from collie_core.data.loader import StepBatch


class Trainer:
    """A run: everything from the config, or any part handed in.

    Args:
        config: the run.
        model, tokenizer: instead of `model:` and `tokenizer:`.
        train_dataset, eval_dataset: rows (dicts in any supported format) instead of `data.train`, `data.eval`.
        optimizer: an optimizer over the handed-in model, or a function from parameter groups to one.
        lr_scheduler: a schedule over the handed-in optimizer, or a function (optimizer, max_steps) to one.
        loss_fn: (outputs, labels, target tokens of the global batch) to this micro-batch's share of the loss.
        train_fn: (model, batch, target tokens of the global batch) to the same; replaces forward and loss.
        eval_fn: (model, batches) to results by name; replaces the evaluators.
        callbacks: objects with event hooks.
        observers: what shows and records the run; None: the standard ones.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        optimizer: Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        lr_scheduler: LRScheduler | Callable[[Optimizer, int], LRScheduler] | None = None,
        loss_fn: LossFn = token_mean_loss,
        train_fn: TrainFn | None = None,
        eval_fn: EvalFn | None = None,
        callbacks: Sequence[object] = (),
        observers: Sequence[object] | None = None,
    ) -> None:
        given = HandedIn(
            model, tokenizer, train_dataset, eval_dataset, optimizer, lr_scheduler, loss_fn, train_fn, eval_fn
        )
        self.config = config
        self.parts = Parts(config, given)
        self.topology = self.parts.topology
        if observers is None:
            observers = standard_observers(config, self.topology)
        adapter = [] if config.adapter is None else config.registry.hooked("adapter", config.adapter.type)
        self.server = ServerBeside(self.parts)
        # The last one is called first: whatever looks at gradients finds them as the adapter wants them.
        self.hooks = config.registry.hook_manager([*callbacks, *observers, *self.server.hooks, *adapter]).hook
        self.checkpoints = Checkpoints(self.parts)
        self.results: dict[str, float] = {}  # the last logged numbers and evaluation results
        self.details: dict[str, str] = {}  # texts that belong to the last evaluation, such as signatures of scores

    @property
    def model(self) -> nn.Module:
        """The model, as handed in or built."""
        return self.parts.model

    @cached_property
    def run(self) -> Run:
        """What hooks see of this run."""
        return Run(self.config, self.topology, self.parts.model, Path(self.config.train.output_dir))

    def train(self) -> dict[str, float]:
        """Train, evaluate and export; returns the last logged numbers and evaluation results.

        Raises:
            CollieError: a part of the run cannot be built, the gradients are no longer numbers, or memory is full.
        """
        watch, memory = watching(self.topology, self.config.parallel.timeout_s), explained(self.parts)
        with watch as progress, memory, self.server, self._random_state(), self._recorded(progress) as (run, asked):
            evaluation, checkpoints = self.config.evaluation, self.checkpoints
            best, meter = BestModel(evaluation.best, run, self._export), Meter(self.topology)
            step = self.parts.step
            guard = Guard(self.config.train, run, step, checkpoints)
            followers: dict[str, Follower] = {"best": best, "meter": meter, "guard": guard}
            for name, state in checkpoints.restored.get("followers", {}).items():
                followers[name].restore(state)
            self.hooks.collie_run_start(run=run)
            if (evaluation.on_start and run.step == 0) or checkpoints.owes_evaluation:
                checkpoints.evaluate(lambda: best.evaluated(self.evaluate()))
                checkpoints.settle(run, asked, followers, self.results)
            nothing = torch.tensor(math.nan, device=self.topology.device)
            step.model.train()  # loaded models come in evaluation mode: no dropout, no gradient checkpointing
            for batch in () if checkpoints.leaving else self.parts.loader(checkpoints.position):
                torch.manual_seed(self._seed(run.step))
                self.hooks.collie_before_step(run=run, batch=batch)
                learning_rate, loss, grad_norm = step.learning_rate, nothing, math.nan
                with guard.watching():  # a step that is left out ends here, and has no numbers
                    loss = step.forward_backward(batch, self._target_tokens(batch))
                    guard.look_at(loss)
                    self.hooks.collie_before_update(run=run)
                    grad_norm = step.update()
                before, run.step, run.epoch = run.epoch, run.step + 1, batch.epoch
                meter.add(loss, batch.tokens)
                self.hooks.collie_after_step(run=run, loss=loss)
                last = run.step == run.max_steps or bool(run.stop_reason)
                due = last or _is_due(evaluation, run, before)
                if due or run.step % self.config.train.logging_steps == 0:
                    self._log(meter.read() | {"learning_rate": learning_rate, "grad_norm": grad_norm})
                if due:
                    checkpoints.evaluate(lambda: best.evaluated(self.evaluate()))
                    meter.restart()
                if checkpoints.due(run, batch, asked, last=last):
                    with meter.paused():
                        checkpoints.save(run, followers, self.results)
                    checkpoints.heed(run, asked)
                self._announce_checkpoints()
                if run.stop_reason or last:
                    break
            if not checkpoints.leaving:
                checkpoints.publish(self._export(run.output_dir / MODEL))
            checkpoints.close()
        return dict(self.results)

    def evaluate(self) -> dict[str, float]:
        """Results over the evaluation samples, as `eval/<name>`; none without evaluation samples."""
        parts = self.parts
        if not parts.evaluates:
            return {}
        model = parts.step.model if parts.training else parts.model
        with evaluating(model):
            results, self.details, samples = self._evaluated(model)
            samples = [*self._sample_texts(), *samples]
        if self.topology.is_main:
            self.hooks.collie_evaluated(run=self.run, results=results, samples=samples)
        self.results |= results
        return results

    def save_model(self, path: str | Path) -> str | Path:
        """Export to the transformers format, or an adapter alone to the peft format: whole or not at all.

        `path` is a folder, or the URL of one in a store. Collective.
        """
        if not is_url(path):
            return self._export(Path(path))
        with TemporaryDirectory() as scratch:
            folder = self._export(Path(scratch) / MODEL)
            self.topology.on_main(lambda: put_trained(folder, str(path)), failing="the model cannot be stored")
        return path

    # -- how ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _recorded(self, progress: Progress) -> Iterator[tuple[Run, Asked]]:
        """The run with its directory and facts, and what it is asked; its end is told to the hooks whatever happens."""
        if self.parts.training:
            raise RunError("this Trainer has trained already; make a new one for another run")
        checkpoints = self.checkpoints
        checkpoints.find()
        if self.topology.is_main:
            refuse_used_directory(self.config, may_replace=checkpoints.may_replace)
        self.topology.require_same(run_identity(self.config))
        self.parts.build()  # before anything is written: what is wrong with a part leaves no directory behind
        self.server.start()
        run, registry = self.run, self.config.registry
        run.max_steps = self.parts.max_steps
        run.facts.update(run_facts(self.parts))
        check_agreement(registry.used(), self.topology)
        checkpoints.restore(run)
        self.results = dict(checkpoints.restored.get("results", {}))
        if self.topology.is_main:
            replace, goes_on = checkpoints.may_replace, checkpoints.continues
            prepare_run_directory(self.config, registry.used(), may_replace=replace, continues=goes_on)
        error: BaseException | None = None
        try:
            with attending(run, progress, saves=checkpoints.are_saved) as asked:
                self.parts.before_turn = asked.before_turn
                yield run, asked
        except BaseException as caught:
            error = caught
            raise
        finally:
            checkpoints.saver.wait()
            self._announce_checkpoints()
            self.hooks.collie_run_end(run=run, error=error)

    def _random_state(self) -> AbstractContextManager[None]:
        """The caller's random state comes back after the run."""
        device = self.topology.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _seed(self, step: int) -> int:
        """Dropout depends on the seed, the step and the data-parallel rank, not on what ran before."""
        return (self.config.train.seed << 32) + step * self.topology.dp.size + self.topology.dp.rank

    def _target_tokens(self, batch: StepBatch) -> int:
        """Of the global batch, counted now: a hook may have masked some."""
        for micro_batch in batch.micro_batches:
            micro_batch.find_targets()
        return max(1, int(self.topology.sum_over_data(batch.target_tokens)))

    def _evaluated(self, model: nn.Module) -> Evaluated:
        parts, eval_fn = self.parts, self.parts.given.eval_fn
        if eval_fn is None:
            return run_evaluators(parts, model, self.run.step if parts.training else None)
        assert parts.eval_dataset is not None
        found = eval_fn(model, parts.eval_batches(parts.eval_dataset))
        return Evaluated({f"eval/{name}": float(value) for name, value in found.items()}, {}, [])

    def _sample_texts(self) -> list[SampleText]:
        """Answers to the first held-out prompts. Ranks that share a model all take part in its forward."""
        count, dataset = self.config.evaluation.print_samples, self.parts.eval_dataset
        alone = self.config.parallel.zero_stage < 3 and self.config.parallel.copy_size == 1
        if not count or dataset is None or (alone and not self.topology.is_main):
            return []
        with self.parts.precision():
            return sample_texts(cast("PreTrainedModel", self.model), self.parts.tokenizer, dataset, count)

    def _log(self, values: dict[str, float]) -> None:
        self.results = {"step": self.run.step, "epoch": self.run.epoch, **values, **self.run.metrics}
        self.run.metrics.clear()
        if self.topology.is_main:
            self.hooks.collie_metrics(run=self.run, values=dict(self.results))

    def _export(self, path: Path, add: Callable[[Path], None] = lambda folder: None) -> Path:
        """`save_model`; the main rank lets `add` put more into the same folder."""

        def write(folder: Path) -> None:
            write_trained(self.parts, folder)
            if self.topology.is_main:
                add(folder)

        write_folder(path, write, self.topology)
        return self._saved(path)

    def _announce_checkpoints(self) -> None:
        for path in self.checkpoints.finished():
            self._saved(path / MODEL)

    def _saved(self, path: Path) -> Path:
        if self.topology.is_main:
            self.hooks.collie_checkpoint_saved(run=self.run, path=path)
        return path


def _is_due(evaluation: EvaluationConfig, run: Run, before: float) -> bool:
    """Whether an evaluation follows the step that has ended, before which so many epochs had passed."""
    steps, epochs = evaluation.steps, evaluation.epochs
    return bool(steps and run.step % steps == 0) or bool(epochs and run.epoch // epochs > before // epochs)
