"""Seeded synthetic chest X-rays with known findings, boxes, masks and poses."""

from cxr.phantom.anatomy import Anatomy
from cxr.phantom.film import Film
from cxr.phantom.render import Box, Phantom, render, sample_pose

__all__ = ["Anatomy", "Box", "Film", "Phantom", "render", "sample_pose"]
