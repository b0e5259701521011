"""`python -m trainer VERB ...` is `svi VERB ...`."""

from trainer.cli import main

if __name__ == "__main__":
    main()
