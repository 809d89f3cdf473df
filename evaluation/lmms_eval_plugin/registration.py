"""The manifest that lmms-eval loads through the entry-point group `lmms_eval.models`."""

from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

MANIFEST = ModelManifest(model_id="focusllava", chat_class_path="evaluation.lmms_eval_plugin.model.FocusLlava")
