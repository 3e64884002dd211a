"""Exports trained adapters for serving engines: whether an engine can load an adapter, and the files it loads.

Files:

    facts.py           The properties of an adapter and its base model that decide whether a serving engine can load it
    formats.py         The files of each export format: their sizes are known before anything is written
    gguf_model.py      The layout of models and adapters in llama.cpp's GGUF files: tensor names, order of rows, and
                       metadata
    gguf_tokenizer.py  Writes BPE tokenizers to GGUF files: tokens, token types, merges, and the name of the pre-
                       tokenizer
    modelfile.py       Ollama's Modelfile: the files of a model and its chat template
    shipment.py        Exports an adapter for a serving engine: checks that the engine can load it, then writes the
                       files
    verdict.py         Checks whether a serving engine can load an adapter, and what to change if it cannot
"""

from nbpeft.shipping.engines import ENGINES as ENGINES
from nbpeft.shipping.facts import AdapterFacts as AdapterFacts
from nbpeft.shipping.shipment import Shipment as Shipment
from nbpeft.shipping.shipment import ship as ship
from nbpeft.shipping.verdict import Obstacle as Obstacle
from nbpeft.shipping.verdict import Verdict as Verdict
