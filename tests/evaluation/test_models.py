"""Models of an evaluation that differ in their seed alone are one group."""

import yaml

from irlfast.evaluation.models import Model, seeds_among


def policy(folder, run: str, phase: str, **keys) -> Model:
    """A policy of a run that has nothing but a configuration."""
    (folder / run).mkdir(exist_ok=True)
    (folder / run / "config.yaml").write_text(yaml.safe_dump({"output_dir": run, **keys}))
    return Model(f"{run}/{phase}", folder / run / phase, folder / run)


def test_the_same_policy_of_runs_with_other_seeds_is_a_group_in_the_order_of_the_seeds(tmp_path):
    models = [
        Model("gpt2", "gpt2", None),
        *(
            policy(tmp_path, f"irft-{seed}", phase, seed=seed, beta=0.1)
            for seed in (2, 0)
            for phase in ("sft", "final")
        ),
        policy(tmp_path, "other-beta", "final", seed=1, beta=0.2),
    ]
    assert seeds_among(models) == {
        "sft of irft-0, irft-2": ["irft-0/sft", "irft-2/sft"],
        "final of irft-0, irft-2": ["irft-0/final", "irft-2/final"],
    }


def test_runs_of_one_seed_and_models_without_a_run_are_no_group(tmp_path):
    alone = [policy(tmp_path, "a", "final", seed=0), policy(tmp_path, "b", "final", seed=0, stages=2)]
    assert seeds_among([Model("gpt2", "gpt2", None), *alone]) == {}
