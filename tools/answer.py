"""Answer for one product.

    python -m tools.answer RUN --image shoe.jpg --text "Elastic sided boot, Shoes" --attribute "Boot Style"

prints `Boot Style: Chelsea  (probability 0.97)`.  docs/answers.md says what the probability means.
"""

import argparse
import sys

from base import console
from base.console import UserError
from evaluate import add_answering_flags, load_run
from support.confidence import temperature_note
from tools.common import parse_product


def main():
    parser = argparse.ArgumentParser(description="Answer for one product.", allow_abbrev=False)
    add_answering_flags(parser)
    args = parse_product(parser)
    run, values = load_run(args, sys.stderr)            # stdout is for the answer
    attribute = run.known_attribute(args.attribute)
    if values:
        if attribute not in values:
            raise UserError(f"there are no known values of {attribute}, only of {', '.join(values)}; "
                            "--values and --constrain together take the file's and the training's")
        print(temperature_note(run), file=sys.stderr)
    answer = run.answer(args.image, args.text, attribute, values=values and values[attribute],
                        min_confidence=args.min_confidence, temperature=args.temperature, top_p=args.top_p)
    print(f"{attribute}: {answer}")


if __name__ == "__main__":
    console.run(main)
