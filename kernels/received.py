"""The attention that keys receive from some queries: what policies vote with."""

from .backends import door
from .reference import received as reference

received = door(reference.received)
