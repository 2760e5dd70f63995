"""`python -m wallaroo.model.training RECIPES.toml STAGE [WORKERS]`: one stage without Ray.

In place of each Parquet file it reads the JSON Lines file of the same name.
"""

import sys

from wallaroo.model.errors import InputError
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.stage import Stopped, train


def main() -> None:
    """Runs the command. A mistake in it or in the recipe ends in one sentence."""
    if len(sys.argv) not in (3, 4) or not "".join(sys.argv[3:] or "1").isdecimal():
        sys.exit("usage: python -m wallaroo.model.training RECIPES.toml STAGE [WORKERS]")
    try:
        print(train(Recipe.from_file(*sys.argv[1:3]), workers=int("".join(sys.argv[3:] or "1"))))
    except (InputError, Stopped) as error:
        sys.exit(f"model.training: {error}")


if __name__ == "__main__":
    main()
