"""`align`: trains, evaluates and shows connectors between frozen encoders and language models."""

from __future__ import annotations

from cli.console import LazyGroup, run

group = LazyGroup(
    "align",
    {
        "train": ("cli.train:train", "Train a connector from a feature store."),
        "filter": (
            "cli.filter:filter_captions",
            "Captions worth training on: what is dropped, and why.",
        ),
        "show": ("cli.show:show", "Samples as the model sees them."),
        "eval": ("cli.eval:evaluate", "Held-out loss, captions and their scores."),
        "caption": (
            "cli.caption:caption",
            "Caption images on the live path.",
        ),
        "export": ("cli.export:export", "A trained run for LLaVA, Cambrian or transformers."),
        "import": ("cli.import_:import_file", "A projector of LLaVA or Cambrian, to start from."),
        "report": ("cli.report:report", "A run as one static HTML page."),
        "plan": (
            "cli.plan:plan",
            "Bytes, hours and break-even of a feature cache, before any is spent.",
        ),
        "parity": ("cli.parity:parity", "Cached against live: features, loss, gradients."),
        "bench": ("cli.bench:bench", "Read speed of the store, beside peers and memcpy."),
        "configs": ("cli.configs:configs", "The recipes shipped, one line each."),
        "demo": ("cli.demo:demo", "The whole job on generated data: extract, train, eval, report."),
    },
    help="Trains connectors between a frozen vision encoder and a frozen language model.",
)


def main() -> None:
    raise SystemExit(run(group))


if __name__ == "__main__":
    main()
