"""The forms in which trained models are deployed: one task's folded file, and the bundle of many."""

from __future__ import annotations

from vpdeploy_export.forms.folded import Folded
from vpdeploy_export.forms.form import Assembly, DeployedForm
from vpdeploy_export.forms.switchable import Switchable

__all__ = ["Assembly", "DeployedForm", "Folded", "Switchable"]
