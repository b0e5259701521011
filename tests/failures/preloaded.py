"""What a rank needs, imported once in the process that ranks are forked from."""

import warnings

warnings.simplefilter("ignore")

import app_models  # noqa: E402, F401
import failure_tools  # noqa: E402, F401

import trainer.cli  # noqa: E402
import trainer.verbs.train  # noqa: E402, F401
