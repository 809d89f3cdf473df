"""FocusLLaVA for transformers: importing this registers model, configuration and processor with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from services.modeling.config import FocusLlavaModelConfig
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.processor import FocusLlavaProcessor

AutoConfig.register(FocusLlavaModelConfig.model_type, FocusLlavaModelConfig)
AutoModelForImageTextToText.register(FocusLlavaModelConfig, FocusLlavaForConditionalGeneration)
AutoProcessor.register(FocusLlavaModelConfig, FocusLlavaProcessor)
