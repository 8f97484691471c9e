"""``python -m wanquant ptq ...`` is ``wanquant ptq ...``."""

from wanquant.cli import main

if __name__ == "__main__":
    main()
