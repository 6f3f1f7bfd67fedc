"""`python -m recover` is `recover`: what `accelerate launch -m recover run recipes/X.yaml` starts."""

from recover.cli import main

if __name__ == "__main__":
    main()
