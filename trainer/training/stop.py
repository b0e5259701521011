"""`stop=converged`: ends training at the end of the round in which it has converged.

Every figure comes from what all ranks hold alike, so they decide alike; what a decision needs is in the checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback

from trainer.engine.module import ChunkModule
from trainer.engine.train_state import TrainState
from trainer.errors import counted
from trainer.inference.recipe.arrowhead import knows_small_sites
from trainer.inference.recipe.convergence import (
    Evidence,
    Rule,
    axis_step,
    of_average,
    scale_error_of_small,
    segment_ends,
    segment_means,
    step_to_go,
)
from trainer.inference.recipe.exact_fit import met_exactly
from trainer.training.newton_steps import EndRound
from trainer.training.refining import refine_at_end

EXACT = "no_maximum"
"""Why a run ends whose observations are met exactly: there is no optimum, whatever the other measures say."""
_WORDS = {
    "mc_error": "Monte Carlo error of the means {:.2g} sd (limit {:.2g})",
    "scale_error": "Monte Carlo error of the log sds {:.2g} (limit {:.2g})",
    "rhat": "R-hat {:.3f} (limit {:.3g})",
    "gain": "{:.2g} nats a parameter to gain over all rows (limit {:.2g})",
    "gradient": "remaining Newton step {:.2g} guide sd (limit {:.2g})",
}


class Stop(Callback):
    """Gathers the segments' means, and judges what each round comes to; ``rule``: None stops at the budget alone.

    An average that Newton steps have replaced is judged by what they leave to go, else by its segments as well. If
    they leave the log scales of small sites as averaged, the segments judge these.
    ``record`` keeps marks and the reason to stop. ``doubts``: what the start said of the
    model, which is said again where the run has not converged.
    """

    def __init__(
        self,
        rule: Rule | None,
        end_round: EndRound,
        steps_per_epoch: int,
        record: TrainState,
        say: Callable[[str], None],
        doubts: Sequence[str] = (),
    ):
        self.rule, self.end_round, self.epoch, self.record, self.say = rule, end_round, steps_per_epoch, record, say
        self.doubts = doubts
        self.marks = record.marks

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ChunkModule)
        if self.record.ending == module.step:  # a signal came while the round ended
            self._end(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, ChunkModule)
        here = module.update.at(module.step - 1)
        ends = segment_ends(here, self.epoch, module.program.sync_every)
        if module.step in ends and module.inference.gaussian is not None:
            self.marks.append((int(module.state.averaged), module.state.average.cpu().clone()))
        if module.step == here.horizon:
            self.record.ending = module.step
            self._end(trainer, module)

    def _end(self, trainer: pl.Trainer, module: ChunkModule) -> None:
        """Ends the round, or leaves the state as it is to be ended another time."""
        before = module.state
        try:
            self._judged(trainer, module)
        except BaseException:
            module.state = before
            raise
        self.record.ending = None
        self.marks.clear()

    def _judged(self, trainer: pl.Trainer, module: ChunkModule) -> None:
        here, average = module.update.at(module.step - 1), module.theta.cpu()
        objective = module.inference.objective
        if not objective.is_elbo or here.average_from < objective.warmup:  # no estimate of the ELBO's optimum
            module.state = module.state._replace(theta=module.theta.clone())
            return
        ends = segment_ends(here, self.epoch, module.program.sync_every)
        refine_at_end(module, self.end_round.sample, self.record)
        moved, left = self.end_round(module)
        exact = met_exactly(module.inference, module.theta.cpu(), self.end_round.sample)
        if exact is not None and (self.rule is not None or module.step == module.update.horizon):
            self.record.stopped, trainer.should_stop = EXACT, True
            self.say(exact)
            return
        view = module.inference.gaussian
        if view is None:
            self._judge_gain(trainer, module, left if moved else math.nan)
            return
        means = segment_means(self.marks) if ends and len(self.marks) == len(ends) else None
        evidence = None
        if moved:
            known = module.update.whitened or knows_small_sites(view)
            small = None if known else scale_error_of_small(view, means)
            evidence = Evidence(None, small, None, left)
        elif means is not None:
            evidence = of_average(view, means, average)._replace(gradient=left)
        if evidence is not None:
            self._judge(trainer, module, evidence, moved and not module.update.whitened)

    def _judge_gain(self, trainer: pl.Trainer, module: ChunkModule, gain: float) -> None:
        """Of a guide of Pyro's or the user's: ``gain`` is what is left, nan where nothing tells."""
        if not math.isnan(gain):
            self._judge(trainer, module, Evidence(None, None, None, None, gain), False)
        elif module.step == module.update.horizon:
            self.say(
                f"the budget of {counted(module.step, 'step')} is spent, and nothing tells whether this guide is at "
                f"its optimum: see whether the ELBO rises with max_steps={2 * module.step}"
            )

    def _judge(self, trainer: pl.Trainer, module: ChunkModule, evidence: Evidence, at_noise: bool) -> None:
        """``at_noise``: what the gradient leaves to go is as little as its draws can tell."""
        theta, rule, last = module.theta, self.rule or Rule(), module.step == module.update.horizon
        if (
            evidence.gradient is not None
            and math.isnan(evidence.gradient)
            and (last or set(rule.short_of(evidence)) <= {"gradient"})
        ):
            view, gradient = module.inference.gaussian, self.end_round.loss.gradient(module.step, theta)
            assert view is not None
            evidence = evidence._replace(gradient=step_to_go(view, theta, axis_step(view, theta, gradient)))
        self.record.evidence, short = evidence._asdict(), rule.short_of(evidence)
        ends = self.rule is not None and (not short or (short == ["gradient"] and at_noise))
        if ends and self.end_round.off_saddle(module, last):
            return
        if not short and self.rule is not None:
            self.record.stopped = "converged"
            trainer.should_stop = True
            asked = [name for name, value in evidence._asdict().items() if value is not None]
            self.say(f"converged at step {module.step:,}: {_words(rule, evidence, asked)}")
        elif ends:
            self.record.stopped = "noise"
            trainer.should_stop = True
            self.say(
                f"stopped at step {module.step:,}, at the noise of the draws: {_words(rule, evidence, short)}; the "
                "model has a ridge: write its hierarchy in the other form (centered or non-centered)"
            )
        elif short and last:
            self.say(
                f"not converged within the budget: {_words(rule, evidence, short)}; train longer with max_epochs= "
                "or max_steps="
            )
            for sentence in self.doubts:
                self.say(sentence)


def _words(rule: Rule, evidence: Evidence, names: Any) -> str:
    return ", ".join(_WORDS[name].format(getattr(evidence, name), getattr(rule, name)) for name in names)
