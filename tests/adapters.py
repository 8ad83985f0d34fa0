"""Models with PEFT adapters, for tests."""

import torch
from models import MODELS, random_states, tokens
from peft import PeftModel, get_peft_model

from s0kernels import swap_modules
from s0kernels.peft import S0Layer, S0PeftConfig

IDS = tokens(3, 14)


def adapted(name: str, seed: int = 0, **options) -> PeftModel:
    """Return a model with a trainable adapter that holds the states of `random_states(seed)`."""
    model = get_peft_model(MODELS[name](), S0PeftConfig(task_type="CAUSAL_LM", **options))
    fill(model, "default", seed)
    return model.eval()


def fill(model: torch.nn.Module, adapter: str, seed: int) -> None:
    values = random_states(model, seed=seed)
    for layer in layers_of(model):
        if adapter in layer.s0_state:
            layer.state(adapter).data.copy_(values[layer.mixer.layer_idx][0])


def add(model: PeftModel, adapter: str, seed: int, **options) -> None:
    model.add_adapter(adapter, S0PeftConfig(task_type="CAUSAL_LM", **options))
    fill(model, adapter, seed)


def layers_of(model: torch.nn.Module) -> list[S0Layer]:
    return [module for module in model.modules() if isinstance(module, S0Layer)]


def learned(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    return model(ids, **options).logits


def attached(name: str, scale: float = 1.0, seed: int = 0) -> torch.nn.Module:
    model = swap_modules(MODELS[name]())
    random_states(model, seed=seed).attach(model, scale)
    return model
