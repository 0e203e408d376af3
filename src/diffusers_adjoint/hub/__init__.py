"""Files for the Hub: weights, the model card and sample images."""

from .card import CardFacts, Licence, Sample, model_card
from .facts import base_model_of, card_facts, hub_id, licence_of, pipeline_tag_of
from .folder import CARD_FILES, pipeline_files, public_json, save_pipeline, write_card, write_samples

__all__ = ["CARD_FILES", "CardFacts", "Licence", "Sample", "base_model_of", "card_facts", "hub_id", "licence_of", "model_card"]
__all__ += ["pipeline_files", "pipeline_tag_of", "public_json", "save_pipeline", "write_card", "write_samples"]
