"""Eight learning rates as one model: a trial is a member, and members do not mix."""

import sys

import torch

import mupgpt as mg


def main(smoke: bool) -> None:
    torch.set_num_threads(1)
    rates = [2.0**e for e in (range(-10, -6) if smoke else range(-12, -4))]
    raw = {"model": "proxy-32", "steps": 4 if smoke else 100}
    configs = [mg.train_config({**raw, "hparams": {"lr": lr}}) for lr in rates]

    population = mg.Population(configs, mg.load_corpus(configs[0].data))
    population.train(configs[0].steps // 2)
    losses = population.evaluate()
    population.keep(sorted(losses, key=lambda k: losses[k])[: len(rates) // 2])  # halve it
    population.train()

    for k, loss in population.evaluate().items():
        print(f"lr {rates[k]:.2e}: {loss:.3f} nats per byte")


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv)
