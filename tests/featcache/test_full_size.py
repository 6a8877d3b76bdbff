"""The full-size encoder on real photographs, end to end; half a minute on two cores."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tensorstore
import torch
from transformers import SiglipVisionModel

import featcache
from featcache.encoders import load_encoder
from featcache.extract import ExtractOptions, extract
from featcache.images import load_image


@pytest.mark.slow
def test_so400m_on_photographs(tmp_path: Path) -> None:
    photographs = Path(matplotlib.get_data_path()) / "sample_data"
    out = tmp_path / "store.zarr"
    model = "siglip2-so400m"
    result = extract(ExtractOptions(model, (photographs,), out, random_weights=True, batch_size=1))
    assert result.ok
    assert result.features >= 2
    store = featcache.open(out)
    rows = store.rows(["grace_hopper.jpg", "logo2.png"])
    with store.reader() as reader:
        ours = reader.read(rows).numpy()
    assert ours.shape == (2, 729, 1152)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{out}/features/-2"}}
    theirs = tensorstore.open(spec).result()
    assert theirs.shape == (result.features, 729, 1152)
    for features, row in zip(ours, rows.tolist(), strict=True):
        np.testing.assert_array_equal(theirs[row].read().result(), features)

    # And they are Hugging Face's own hidden states, rounded to fp16.
    encoder = load_encoder(model, random_weights=True)
    assert isinstance(encoder.model, SiglipVisionModel)
    pixels = encoder.preprocess(load_image(photographs / "grace_hopper.jpg"))
    with torch.inference_mode():
        output = encoder.model(
            encoder.normalize(torch.from_numpy(pixels)[None]), output_hidden_states=True
        )
    np.testing.assert_array_equal(output.hidden_states[-2][0].half().numpy(), ours[0])
