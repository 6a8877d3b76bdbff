from __future__ import annotations
from pathlib import Path
from align.trainer import train
def test_basic(store, make_config, tmp_path):
    ev=[]
    r=train(make_config("train.steps=30"),[store.path],tmp_path/"run",on_event=ev.append)
    for e in ev: print(e)
    print(r)
