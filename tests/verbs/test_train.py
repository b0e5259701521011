"""`svi train` end to end, in this process: what a run leaves behind, and that the user's own models and guides work."""

import csv
import errno
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from app_tools import WEIGHTS, config, final_state, tensors
from rich.console import Console

from trainer.data.shards.cache import ShardCache
from trainer.errors import UserError
from trainer.training.budget import optimizer_of, update_of
from trainer.training.tables import shards_of

KEYS = {
    "elbo", "elbo_se", "elbo_per_row", "held_out_elbo_per_row", "rows", "steps", "epochs", "seconds", "rows_per_second",
    "world_size", "stop_reason",
}  # fmt: skip


def summary(run_dir):
    with (run_dir / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_holds_what_it_promises(fit, shards):
    run_dir = fit("max_steps=130", "checkpoint.every_n_steps=50")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    assert (metrics["steps"], metrics["world_size"], metrics["stop_reason"]) == (130, 1, "converged")
    assert metrics["rows"] + metrics["held_out_rows"] == 3000
    assert math.isclose(metrics["elbo_per_row"], metrics["elbo"] / metrics["rows"])
    assert list(summary(run_dir)[0]) == ["site", "index", "mean", "sd", "q05", "q50", "q95", "loc", "scale"]
    with (run_dir / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert {50, 100, 130} <= set(steps)  # chunks end where a checkpoint is due, and with the segments of an average
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("*.ckpt")) == [
        "step_000000100.ckpt",
        "step_000000130.ckpt",
    ]
    assert (run_dir / ".hydra" / "resolved.yaml").exists()


def test_the_posterior_is_near_the_least_squares_answer(fit, table):
    data = np.load(table)
    rows = summary(fit("max_steps=600"))
    means = [float(row["mean"]) for row in rows if row["site"] == "w"]
    ols, *_ = np.linalg.lstsq(data["x"], data["y"], rcond=None)
    assert np.allclose(means, ols, atol=0.03)
    assert np.allclose(means, WEIGHTS, atol=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model._target_=app_models.Regression", "model.in_features=3", "model.out_features=1"),
        ("model._target_=app_models.with_arguments", "model.prior_sd=3.0"),
        ("model._target_=app_models.with_arguments", "guide._target_=app_models.own_guide", "objective.kl=monte_carlo"),
        ("guide._target_=pyro.infer.autoguide.AutoNormal",),
        ("guide._target_=pyro.infer.autoguide.AutoMultivariateNormal", "guide.init_scale=0.05"),
        ("model=linear",),
        ("objective.kl=sticking_the_landing", "objective.pairs=2", "objective.antithetic=false"),
        ("optimizer=adamw", "schedule=one_cycle"),
        ("optimizer=clipped_adam", "schedule=robbins_monro"),
        ("optimizer=sgd", "schedule=constant", "optimizer.lr=0.001"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_models_guides_and_recipes(fit, overrides):
    run_dir = fit(*overrides, "max_steps=64")
    with (run_dir / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert math.isfinite(float(last["elbo_per_row"]))


def test_a_vae_with_the_methods_model_and_guide(fit):
    """Latents of a row, a network in model and guide (`pyro.module`): the ELBO rises."""
    run_dir = fit("model._target_=app_models.VAE", "max_steps=300", "slots=50")
    with (run_dir / "metrics.csv").open(newline="") as file:
        elbos = [float(row["elbo_per_row"]) for row in csv.DictReader(file)]
    assert elbos[-1] > elbos[0] + 0.1
    assert set(final_state(run_dir)[1]["shapes"]) == {
        "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias",
    }  # fmt: skip


def test_draws_and_lanes_are_the_runs_own(fit):
    facts = final_state(fit("draws=4", "max_steps=8"))[1]
    assert facts["plan"]["draws"] == 4
    assert facts["plan"]["lanes"] == 8


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(fit, tmp_path):
    one, two, other = (
        final_state(fit("max_steps=20", f"seed={seed}", run_dir=tmp_path / name))[0].theta
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


BAD = {
    "model._target_=nowhere.model": "_target_=nowhere.model cannot be imported",
    "model._target_=null": "no model was given",
    "model._target_=app_models.needs_more": 'needs an argument "weather" that is not a column',
    "model._target_=app_models.outside_plate": 'observed site "y" stands outside plate "data"',
    "model._target_=app_models.half_outside": 'observed site "total" stands outside plate "data"',
    "model._target_=app_models.local_latent": "all latents are of rows, which are integrated out",
    "model._target_=app_models.endless": 'latent site "k" is a Poisson, which has no end of states',
    "model._target_=app_models.centring": "not exchangeable over rows",
    "data.path=/nowhere": "there is no shard folder at /nowhere",
    "batch_size=0": "batch_size=0 must be a whole number from 1 up.",
    "batch_size=250 data.lanes=8": "batch_size(250) % lanes(8) != 0",
    "data.lanes=8 draws=3": "lanes(8) % draws(3) != 0",
    "max_steps=0": "max_steps=0 must be a whole number from 1 up, or null.",
    "max_steps=abc": "max_steps=abc must be a whole number from 1 up, or null.",
    "max_epochs=-1": "max_epochs=-1 must be a number above 0",
    "averaging=1.5": "averaging=1.5 must be a number from 0 and below 1.",
    "dtype=float16": "dtype=float16 must be float32 or float64, or null.",
    "trainer.devices=0": "trainer.devices=0 must be a whole number from 1 to 1,024 or auto.",
    "ckpt_path=https://example.org/a.ckpt": "is a URL",
    "ckpt_path=missing.ckpt": "checkpoint missing.ckpt does not exist",
    "schedule=robbins_monro schedule.forgetting=0.3": "schedule.forgetting=0.3 must be a number above 0.5 to 1.",
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.items(), ids=list(BAD))
def test_bad_input_is_one_sentence_and_leaves_nothing(fit, tmp_path, overrides, sentence):
    with pytest.raises(UserError) as error:
        fit(*overrides.split())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+trainer.max_epochs=3", "trainer.max_epochs is not an option of the trainer here: give max_epochs="),
        ("+trainer.fast=true", "trainer.fast is not an option of the trainer here: leave it out"),
        ("+logger.wandb.project=x", "logger.wandb is set, but there is no such logger in this run: add logger=wandb"),
    ],
)
def test_an_option_of_nothing_is_one_sentence(fit, override, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        fit(override)


def test_a_run_goes_on_where_a_full_disk_cut_the_first_line_of_its_figures(fit):
    run_dir = fit("max_steps=4", "stop=budget")
    for cut in ("", "step,sec"):
        (run_dir / "metrics.csv").write_text(cut)
        fit("max_steps=8" if not cut else "max_steps=12", "stop=budget", "ckpt_path=last")
        with (run_dir / "metrics.csv").open(newline="") as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == [12 if cut else 8]


def test_a_run_folder_is_not_overwritten(fit):
    fit("max_steps=4")
    with pytest.raises(UserError, match="holds a run already"):
        fit("max_steps=4")


def test_a_checkpoint_of_another_model_data_or_optimizer_is_refused(fit, table, tmp_path):
    from trainer.data.packing.pack import pack

    pack(str(table), tmp_path / "other", seed=5)
    fit("max_steps=4")
    for override, sentence in (
        ("model._target_=app_models.with_arguments", "another model or guide"),
        ("guide._target_=pyro.infer.autoguide.AutoNormal", "another model or guide"),
        (f"data.path={tmp_path / 'other'}", "trained on other data"),
        ("optimizer=sgd", "the same optimizer="),
        ("seed=3", "trained with seed=0, not 3"),
        ("dtype=float32", "set dtype="),
    ):
        with pytest.raises(UserError, match=sentence):
            fit("ckpt_path=last", "max_steps=8", override)


def test_every_group_composes_and_its_targets_take_their_arguments():
    """Each yaml of each group: it composes, its target imports, and its keys are parameters of the target."""
    import inspect

    from hydra.utils import get_object
    from omegaconf import DictConfig, OmegaConf

    from trainer.cli import config_folder
    from trainer.inference.rows.options import OPTIONS

    options = [(path.parent.name, path.stem) for path in sorted(config_folder().glob("*/*.yaml"))]
    assert len(options) > 15
    for group, name in options:
        cfg = config("train", "data.path=x", f"{group}={name}")
        if not isinstance(getattr(cfg, group, None), DictConfig):  # keys of the top level, or none
            continue
        node = OmegaConf.to_container(getattr(cfg, group), resolve=False)
        for spec in [node] if "_target_" in node else node.values():
            if isinstance(spec, dict) and spec.get("_target_"):
                parameters = inspect.signature(get_object(spec["_target_"])).parameters
                free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
                beside = set(OPTIONS) if group == "guide" else set()  # those of latents of rows
                unknown = set(spec) - {"_target_"} - beside - set(parameters)
                assert free or not unknown, f"{group}/{name}: {unknown}"


def test_the_horizon_and_the_average_are_whole_epochs(shards):
    from trainer.data.plan import Plan

    plan = Plan(np.full(10, 100), 0, 8, 96)
    update = update_of(config("train", "data.path=x", "max_epochs=20"), plan, whitened=False, anchored=0)
    assert (plan.steps_per_epoch, update.horizon) == (11, 220)
    assert update.rounds[-1].average_from == 220 - 55
    assert (
        update_of(
            config("train", "data.path=x", "max_epochs=20", "max_steps=100"), plan, whitened=False, anchored=0
        ).horizon
        == 100
    )
    assert update_of(config("train", "data.path=x"), plan, whitened=False, anchored=0).horizon == 20_000


def test_a_budget_is_spent_in_rounds_each_twice_the_one_before():
    """1, 2, 4 and 8 fifteenths, fewer where the first would be short; each averages its last quarter in whole epochs;
    what the optimizer leaves open is the recipe's."""
    from trainer.data.plan import Plan

    plan = Plan(np.full(10, 100), 0, 8, 96)
    cfg = config("train", "data.path=x", "max_steps=4500")
    cfg = replace(cfg, optimizer=optimizer_of(cfg, whitened=True))
    rounds = update_of(cfg, plan, whitened=True, anchored=0).rounds
    assert [(each.start, each.horizon) for each in rounds] == [(0, 300), (300, 900), (900, 2100), (2100, 4500)]
    assert [each.horizon - each.average_from for each in rounds] == [66, 143, 297, 594]
    assert (rounds[-1].optimizer.lr, rounds[-1].optimizer.beta2) == (0.2, 0.9999)
    cfg = config("train", "data.path=x", "max_steps=1000")
    cfg = replace(cfg, optimizer=optimizer_of(cfg, whitened=False))
    few = update_of(cfg, plan, whitened=False, anchored=0).rounds
    assert [each.horizon for each in few] == [333, 1000]
    assert few[0].optimizer.lr == 0.05
    with pytest.raises(UserError, match="rounds=0 must be a whole number from 1"):
        update_of(config("train", "data.path=x", "rounds=0"), plan, whitened=False, anchored=0)


def test_a_run_that_converged_stops_there_and_stays_there(fit, capsys):
    """At the end of a round, with the figures; what is resumed afterwards trains no further, unless told to."""
    run_dir = fit("max_steps=1000")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert (metrics["steps"], metrics["stop_reason"]) == (333, "converged")
    assert set(metrics["evidence"]) == {"mc_error", "scale_error", "rhat", "gradient", "gain"}
    assert metrics["evidence"]["gradient"] <= 0.1
    assert metrics["passes"] >= 1
    said = capsys.readouterr().out
    assert f"converged at step 333: remaining Newton step {metrics['evidence']['gradient']:.2g} guide sd" in said
    before = final_state(run_dir)[0]
    fit("max_steps=1000", "ckpt_path=last")
    assert "since the run has converged: train further with stop=budget" in capsys.readouterr().out.replace("\n", " ")
    assert torch.equal(final_state(run_dir)[0].theta, before.theta)
    fit("max_steps=1000", "ckpt_path=last", "stop=budget")
    assert int(final_state(run_dir)[0].step) == 1000


def test_what_a_stop_is_decided_by_is_in_the_checkpoint(fit, tmp_path):
    """A run cut in the middle of its average and resumed stops where the whole one does, with the same evidence."""
    whole = fit("max_steps=1000", "recipe=plain", "rounds=2", "averaging=0.25", run_dir=tmp_path / "whole")
    cut = tmp_path / "cut"
    options = ("max_steps=1000", "recipe=plain", "rounds=2", "averaging=0.25", "checkpoint.every_n_steps=300")
    fit(*options, run_dir=cut)
    for newer in (cut / "checkpoints").glob("*"):
        if "000000300" not in newer.name:
            newer.unlink()
    (cut / "metrics.json").unlink()
    fit(*options, "ckpt_path=last", run_dir=cut)
    one, other = (json.loads((run / "metrics.json").read_text()) for run in (whole, cut))
    assert one["evidence"] == other["evidence"]
    assert (one["steps"], one["stop_reason"]) == (other["steps"], other["stop_reason"])


def test_a_resumed_run_knows_where_newton_steps_have_failed(fit, capsys, monkeypatch):
    monkeypatch.setattr("trainer.training.newton_steps.polished", lambda *given: None)
    options = ("max_steps=1050", "start=zero", "newton_after=0", "stop=budget", "checkpoint.every_n_steps=200")
    options = (*options, "checkpoint.keep_last=9")
    run_dir = fit(*options)
    assert re.findall(r"step ([\d,]+): Newton steps", capsys.readouterr().out) == ["150", "1,050"]
    for newer in (run_dir / "checkpoints").glob("*"):
        if "000000200" not in newer.name:
            newer.unlink()
    fit(*options, "ckpt_path=last")
    assert re.findall(r"step ([\d,]+): Newton steps", capsys.readouterr().out) == ["1,050"]


def test_a_budget_that_is_too_small_says_what_is_missing(fit, capsys):
    fit("max_steps=100", "recipe=plain", "averaging=0.5")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "not converged within the budget: " in said
    assert "train longer with max_epochs= or max_steps=" in said


def test_an_anchored_run_keeps_its_anchor_beyond_a_round(fit, tmp_path):
    """By the default recipe, whose rounds end in Newton steps and new coordinates."""
    options = ("max_steps=700", "rounds=2", "stop=budget")
    found = [summary(fit(*options, f"estimator={name}", run_dir=tmp_path / name)) for name in ("plain", "anchor")]
    for plain, anchored in zip(*found, strict=True):
        assert abs(float(plain["mean"]) - float(anchored["mean"])) < 0.05 * float(plain["sd"])
        assert float(anchored["sd"]) == pytest.approx(float(plain["sd"]), rel=0.02)


def cut_back_to_step_50(run_dir):
    """Leaves what a run had kept that was killed after step 50."""
    for newer in (run_dir / "checkpoints").glob("*"):
        if "000000050" not in newer.name:
            newer.unlink()
    (run_dir / "metrics.json").unlink()


def test_an_anchored_run_resumes_bit_for_bit(fit, tmp_path):
    """The anchor is in the checkpoint: a run cut in the middle of an epoch goes on with it."""
    options = ("max_steps=60", "start=zero", "estimator=anchor", "rounds=1", "checkpoint.every_n_steps=25")
    whole, cut = fit(*options, run_dir=tmp_path / "whole"), fit(*options, run_dir=tmp_path / "cut")
    cut_back_to_step_50(cut)
    fit(*options, "ckpt_path=last", run_dir=cut)
    for one, other in zip(tensors(final_state(whole)[0]), tensors(final_state(cut)[0]), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="estimator=anchor needs guide=mean_field"):
        fit("estimator=anchor", "guide._target_=pyro.infer.autoguide.AutoNormal", run_dir=tmp_path / "other")


def test_a_warmup_of_the_kl_resumes_bit_for_bit_and_is_judged_after_it(fit, tmp_path, capsys):
    """Its figures are of the ELBO: they end where those of a run without it do."""
    options = ("max_steps=450", "rounds=2", "objective.kl_weight=0.1", "objective.kl_warmup=200")
    options = (*options, "checkpoint.every_n_steps=50", "checkpoint.keep_last=20")
    whole, cut = fit(*options, run_dir=tmp_path / "whole"), fit(*options, run_dir=tmp_path / "cut")
    assert capsys.readouterr().out.count("converged at step 450:") == 2  # not at 150, within the warm-up
    cut_back_to_step_50(cut)
    fit(*options, "ckpt_path=last", run_dir=cut)
    for one, other in zip(tensors(final_state(whole)[0]), tensors(final_state(cut)[0]), strict=True):
        assert torch.equal(one, other)
    plain = fit("max_steps=450", "rounds=2", run_dir=tmp_path / "plain")
    elbos = [json.loads((run / "metrics.json").read_text())["elbo"] for run in (whole, plain)]
    assert elbos[0] == pytest.approx(elbos[1], abs=0.1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("max_steps=60 objective.kl_weight=0.5 objective.kl_warmup=60", "objective.kl_warmup=60 must be at most 49, "),
        ("objective.kl_weight=0.5 objective.kl_warmup=9 estimator=anchor", "has the gradient of the ELBO"),
        ("objective=iw", "objective=renyi weights draws by all rows, and an epoch has 11 steps: give batch_size="),
        ("objective=iw batch_size=4096 draws=2", "and a step has 2 draws: give batch_size="),
        ("objective=iw batch_size=4096 estimator=anchor", "has the gradient of the ELBO"),
        ("objective=renyi model._target_=app_models.VAE", "and the guide draws latents of rows: leave objective=elbo."),
        ("objective=renyi guide=point", "and the guide draws nothing: leave objective=elbo."),
        ("objective=iw batch_size=4096 model._target_=app_models.with_parameter", "set objective.doubly=false."),
    ],
)
def test_an_objective_that_cannot_be_is_refused(fit, options, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(*options.split(), "start=zero")


@pytest.mark.parametrize("options", ["objective=iw objective.draws=4", "objective=renyi objective.alpha=0.3"])
def test_bounds_of_several_draws_end_at_the_posterior_and_report_the_elbo(fit, tmp_path, options, capsys):
    """Of a nearly Gaussian posterior, so that all bounds have nearly the same optimum."""
    common = ("batch_size=4096", "max_steps=450", "rounds=2")
    plain, found = fit(*common, run_dir=tmp_path / "plain"), fit(*common, *options.split(), run_dir=tmp_path / "found")
    for one, other in zip(summary(found), summary(plain), strict=True):
        assert abs(float(one["mean"]) - float(other["mean"])) < 0.15 * float(other["sd"])
        assert float(one["sd"]) == pytest.approx(float(other["sd"]), rel=0.1)
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (found, plain))
    assert first["elbo"] == pytest.approx(second["elbo"], abs=0.3)
    assert (first["steps"], first["stop_reason"], second["stop_reason"]) == (450, "budget", "converged")


def test_a_table_is_packed_on_the_fly_once(fit, table, tmp_path, capsys):
    """Beside it, said; the same rows as those of `svi shard`; a table that has changed since is refused."""
    here = tmp_path / "table.npz"
    shutil.copy(table, here)
    first = fit("max_steps=5", f"data.path={here}", run_dir=tmp_path / "a")
    assert f"packing {here} into {here}.shards, this once" in capsys.readouterr().out.replace("\n", " ")
    again = fit("max_steps=5", f"data.path={here}", run_dir=tmp_path / "b")
    assert "packing" not in capsys.readouterr().out
    packed = fit("max_steps=5", f"data.path={here}.shards", run_dir=tmp_path / "c")
    thetas = [final_state(run)[0].theta for run in (first, again, packed)]
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], thetas[2])
    later = Path(f"{here}.shards").stat().st_mtime + 10
    os.utime(here, (later, later))
    with pytest.raises(UserError, match="has changed since it was packed: remove"):
        fit("max_steps=5", f"data.path={here}", run_dir=tmp_path / "d")


def test_a_partition_that_has_changed_since_it_was_packed_is_seen(table, tmp_path):
    part = tmp_path / "t" / "year=2020" / "a.parquet"
    part.parent.mkdir(parents=True)
    pq.write_table(pa.table({"y": np.load(table)["y"]}), part)
    shards = [shards_of([str(tmp_path / "t")], Console(), ShardCache(tmp_path / "cache")) for _ in range(2)]
    assert shards == 2 * [[str(tmp_path / "t.shards")]]
    later = part.stat().st_mtime + 10
    os.utime(part, (later, later))
    with pytest.raises(UserError, match="has changed since it was packed: remove"):
        shards_of([str(tmp_path / "t")], Console(), ShardCache(tmp_path / "cache"))


def test_where_nothing_can_be_written_beside_a_table_is_said(table, tmp_path, monkeypatch):
    def refused(*given, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("trainer.training.tables.FileLock.acquire", refused)
    with pytest.raises(UserError, match=r"shards cannot be written \(Permission denied\): pack it elsewhere"):
        shards_of([str(table)], Console(), ShardCache(tmp_path / "cache"))
