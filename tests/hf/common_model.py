"""The Sparse Transformer under transformers' own common model tests.

`test_common.py` copies this file next to them, where `tests` is their package, not ours.
"""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import torch
from transformers.models.auto import modeling_auto

from colonnade.hf import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerModel,
)
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

NAME = SparseTransformerConfig.model_type
modeling_auto.MODEL_MAPPING_NAMES[NAME] = "SparseTransformerModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NAME] = "SparseTransformerForCausalLM"


class Tester:
    """Sizes and inputs, by the names under which the common tests look for them."""

    batch_size, seq_length = 3, 21
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    is_training = True

    def get_config(self) -> SparseTransformerConfig:
        return SparseTransformerConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            stride=8,
            summary=2,
            subblocks=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )

    def prepare_config_and_inputs_for_common(
        self,
    ) -> tuple[SparseTransformerConfig, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, 99),
            "attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), inputs


class SparseTransformerTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (SparseTransformerModel, SparseTransformerForCausalLM)

    def setUp(self) -> None:
        self.model_tester = Tester()
        self.config_tester = ConfigTester(
            self, config_class=SparseTransformerConfig, hidden_size=32
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_causal_lm_loss_honors_shift_labels(self) -> None:
        """Our output head begins at zero, where no loss depends on its targets: not so here."""
        begin = SparseTransformerForCausalLM.__init__

        def filled(model: SparseTransformerForCausalLM, config: SparseTransformerConfig) -> None:
            begin(model, config)
            torch.nn.init.normal_(model.lm_head.weight)

        with mock.patch.object(SparseTransformerForCausalLM, "__init__", filled):
            super().test_causal_lm_loss_honors_shift_labels()

    def test_model_outputs_equivalence(self) -> None:
        """Without attention weights: asking for them is refused."""
        with mock.patch.object(SparseTransformerTest, "has_attentions", new=False):
            super().test_model_outputs_equivalence()

    @unittest.skip("ours: there are no attention weights to give out; none is ever kept")
    def test_attention_outputs(self) -> None: ...

    @unittest.skip("ours: there are no attention weights to give out; none is ever kept")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...
