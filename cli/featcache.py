"""`featcache`: makes and inspects stores of vision-encoder features."""

from __future__ import annotations

from cli.console import LazyGroup, run

group = LazyGroup(
    "featcache",
    {
        "extract": ("cli.extract:extract", "Encode images once into a feature store."),
        "info": ("cli.info:info", "Shape, codec, encoder, rows, failures and bytes of a store."),
        "convert": ("cli.convert:convert", "Zarr to HDF5 and back, or another codec."),
        "verify": ("cli.verify:verify", "Check a store byte by byte; mend it with --repair."),
        "failures": ("cli.failures:failures", "The images without features, and why."),
        "diff": ("cli.diff:diff", "What two stores have in common, and what not."),
        "gc": ("cli.gc:gc", "Free the features that no image means any more."),
        "models": ("cli.models:models", "The encoders known by name."),
    },
    help="A cache of frozen vision-encoder features: encode once, read back at memory speed.",
)


def main() -> None:
    raise SystemExit(run(group))


if __name__ == "__main__":
    main()
