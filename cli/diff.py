"""`featcache diff`: what two stores have in common."""

from __future__ import annotations

from dataclasses import asdict

import click

from cli import console
from featcache.object_path import StorePath


@console.command("diff", interrupted="nothing was changed")
@click.argument("left", type=console.LOCATION, metavar="A")
@click.argument("right", type=console.LOCATION, metavar="B")
def diff(left: StorePath, right: StorePath) -> console.Document:
    """Compare stores A and B: how they were made, their images, their failures.

    The exit code is 0 also where they differ; "same" in --json says whether they do.
    """
    import featcache
    from featcache.compare import Some, compare

    found = compare(featcache.open(left), featcache.open(right))
    images = found.images
    if found.fields:
        console.table(
            ["field", "A", "B", ""],
            [[f.name, f.left, f.right, "harmless" if f.harmless else ""] for f in found.fields],
        )

    def some(keys: Some) -> str:
        listed = ", ".join(keys.first) + (", ..." if keys.count > len(keys.first) else "")
        return f"{keys.count:,}" + (f" ({listed})" if listed else "")

    console.fields(
        {
            "keys only in A": some(images.only_left),
            "keys only in B": some(images.only_right),
            "keys in both": f"{images.shared:,}: {images.same:,} the same image, "
            f"{images.other:,} another, {images.shared - images.same - images.other:,} unknown",
            "failures that differ": f"{found.failures:,} of the keys in both",
        }
    )
    for image in images.other_first:
        console.say(f"  {image.key}: {image.left} in A, {image.right} in B")
    for failure in found.failures_first:
        reasons = [failure.left or "has features", failure.right or "has features"]
        console.say(f"  {failure.key}: {reasons[0]} in A, {reasons[1]} in B")
    answer = {
        "same": found.same,
        "can be joined by image key": images.joinable,
        "features are interchangeable": found.interchangeable,
    }
    console.fields({name: "yes" if value else "no" for name, value in answer.items()})
    return {
        "same": found.same,
        "joinable": images.joinable,
        "interchangeable": found.interchangeable,
        "fields": [
            {
                "name": f.name,
                "left": _plain(f.left),
                "right": _plain(f.right),
                "harmless": f.harmless,
            }
            for f in found.fields
        ],
        "images": asdict(images),
        "failures": {
            "differ": found.failures,
            "first": [asdict(failure) for failure in found.failures_first],
        },
    }


def _plain(value: object) -> object:
    """For JSON: null where a field is absent."""
    from featcache.fingerprint import ABSENT

    return None if value is ABSENT else value
