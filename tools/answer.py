"""Answer for one product.

    python -m tools.answer RUN --image shoe.jpg --text "Elastic sided boot, Shoes" --attribute "Boot Style"

prints `Boot Style: Chelsea  (probability 0.97)`.  docs/answers.md says what the probability means.
"""

import sys

from base import console
from base.console import parse_flags
from evaluate import answer_parser, load_run
from support.answering import answers, check_questions, prepare_photos
from support.confidence import temperature_note


def parse_product(parser):
    """The command line with the flags of one product."""
    parser.add_argument("--image", metavar="FILE", help="photo of the product")
    parser.add_argument("--text", metavar="TEXT", help='"title, category"')
    parser.add_argument("--attribute", metavar="NAME", default="", help="what to answer")
    return parse_flags(parser)


def main():
    args = parse_product(answer_parser("Answer for one product."))
    run, values = load_run(args, sys.stderr)            # stdout is for the answer
    product = run.product(args.image, args.text, args.attribute)
    prepare_photos(run, [product])
    check_questions(run, [product], values)
    if values:
        print(temperature_note(run), file=sys.stderr)
    [answer] = answers(run, [product], values, args.temperature, args.top_p)
    print(f"{product.attribute}: {answer.above(args.min_confidence)}")


if __name__ == "__main__":
    console.run(main)
