"""`python -m ssmamba_models` is the `ssmamba` command: what `accelerate launch -m` and `torchrun -m` start."""

from ssmamba_models.cli.main import main

if __name__ == "__main__":
    main()
