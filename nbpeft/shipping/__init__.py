"""Exports trained adapters for serving engines: whether an engine can load an adapter, and the files it loads."""

from nbpeft.shipping.engines import ENGINES as ENGINES
from nbpeft.shipping.facts import AdapterFacts as AdapterFacts
from nbpeft.shipping.shipment import Shipment as Shipment
from nbpeft.shipping.shipment import ship as ship
from nbpeft.shipping.verdict import Obstacle as Obstacle
from nbpeft.shipping.verdict import Verdict as Verdict
