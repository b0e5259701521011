"""`hydra/launcher=slurm`: submitit's launcher, for which a job that was killed or stopped has failed and ends no other.

Hydra imports this at the start of every Hydra program of an environment, with or without submitit.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as _OfSubmitit
except ModuleNotFoundError:
    pass
else:

    class SlurmLauncher(_OfSubmitit):
        """Jobs of Slurm, all of which are waited for; conf/hydra/launcher/slurm.yaml has the options."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from submitit import SlurmJob
            from submitit.core.utils import UncompletedJobError

            results = SlurmJob.results

            def told(job: SlurmJob[JobReturn]) -> list[JobReturn]:
                try:
                    return results(job)
                except UncompletedJobError:
                    return [JobReturn(status=JobStatus.FAILED, _return_value=_end_of(job))]

            SlurmJob.results = told
            try:
                returns = super().launch(job_overrides, initial_job_idx)
            finally:
                SlurmJob.results = results
            for each, overrides in zip(returns, job_overrides, strict=True):
                each.overrides = each.overrides or list(overrides)
            return returns


def _end_of(job: Any) -> Exception:
    """What became of a job of submitit's that left no result."""
    log = job.paths.stdout
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    stopped = [line for line in lines if line.startswith("stopped by ")]
    if stopped:
        return CompactHydraException(f"job {job.job_id} was {stopped[-1]}")
    return CompactHydraException(f"job {job.job_id} ended as {job.state}, without a result: {log} is its log.")
