"""Hugging Face Trainer: `optimizers=(optimizer, scheduler)` takes a CLASSPOptimizer.

    pip install transformers accelerate
    python examples/with_trainer.py

A tiny vision transformer, made from a config, learns digits, and then digits that are turned by a
quarter circle. One optimizer goes through both trainings, so that the history of the first counts
in the second. Last lines:

    after the first:  upright 63.7 %, turned 13.6 %
    after the second: upright 36.9 %, turned 64.0 %
"""

import torch
from sklearn.datasets import load_digits
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    get_constant_schedule,
)

from avalanche_classp import CLASSPOptimizer

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float().reshape(-1, 1, 8, 8) / 8 - 1
tasks = {"upright": images, "turned": images.rot90(1, (2, 3))}

torch.manual_seed(0)
config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
)
model = ViTForImageClassification(config)
optimizer = CLASSPOptimizer(model.parameters(), lr=0.005)
scheduler = get_constant_schedule(optimizer)
arguments = TrainingArguments(
    output_dir="checkpoints",
    per_device_train_batch_size=32,
    num_train_epochs=6,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
)
lines = []
for when, name in zip(("first: ", "second:"), tasks, strict=True):
    samples = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(tasks[name][:1200], labels, strict=False)
    ]
    optimizers = (optimizer, scheduler)
    Trainer(model=model, args=arguments, train_dataset=samples, optimizers=optimizers).train()
    model.eval()
    with torch.no_grad():
        correct = [model(x[1200:]).logits.argmax(1) == labels[1200:] for x in tasks.values()]
    upright, turned = (100 * some.float().mean() for some in correct)
    lines.append(f"after the {when} upright {upright:.1f} %, turned {turned:.1f} %")
print("\n".join(lines))
