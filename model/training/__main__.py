"""`python -m wallaroo.model.training RECIPES.toml STAGE [WORKERS] [--overwrite]`: one stage without Ray.

In place of each Parquet file it reads the JSON Lines file of the same name.
"""

import sys

from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import Stopped, train


def main() -> None:
    """Runs the command. A mistake in it or in the recipe ends in one sentence."""
    given = [word for word in sys.argv[1:] if word != "--overwrite"]
    if len(given) not in (2, 3) or not "".join(given[2:] or "1").isdecimal():
        sys.exit("usage: python -m wallaroo.model.training RECIPES.toml STAGE [WORKERS] [--overwrite]")
    workers, overwrite = int("".join(given[2:] or "1")), len(given) < len(sys.argv) - 1
    try:
        print(train(Recipe.from_file(*given[:2]), workers=workers, overwrite=overwrite))
    except (InputError, Stopped) as error:
        sys.exit(f"model.training: {error}")


if __name__ == "__main__":
    main()
