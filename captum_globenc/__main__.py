"""``python -m captum_globenc``: the command line."""

from captum_globenc.cli import app

if __name__ == "__main__":
    app(prog_name="captum-globenc")
