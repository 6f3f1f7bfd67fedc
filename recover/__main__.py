"""`python -m recover` is `recover`: what `accelerate launch -m recover run recipes/X.yaml` starts."""

from recover.base.safe_path import leave_working_folder

leave_working_folder()  # before anything else is imported

from recover.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
