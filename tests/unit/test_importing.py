"""Scenarios from other programs' files: what each line of them becomes, and what is said where they are silent."""

from __future__ import annotations

import json

import pytest

from sim.asking import ask_scenario
from sim.errors import ScenarioError
from sim.importing import import_scenario
from sim.interop.megatron_args import options_of, read_megatron_args
from sim.interop.shell import words_of
from sim.interop.torchtitan import read_torchtitan
from sim.scenario.load import load_scenario_text

SCRIPT = r"""#!/bin/bash
# Runs the "175B" parameter model; it's a comment with a quote
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NUM_NODES=${NNODES:-16}
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))
CHECKPOINT_PATH=$1 #<Specify path>
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES   # how many
    --master_addr $MASTER_ADDR
)
GPT_MODEL_ARGS=(
    --num-layers 96
    --hidden-size 12288
    --num-attention-heads 96
    --seq-length 2048
    --max-position-embeddings 2048
    --attention-backend flash # Can use (flash/fused/unfused/local)
)
TRAINING_ARGS="
    --micro-batch-size 1 \
    --global-batch-size $((WORLD_SIZE*12)) \
    --clip-grad 1.0 --fp16 --lr 6.0e-5
"
if [ -n "$SP" ]; then
    TRAINING_ARGS="$TRAINING_ARGS --use-distributed-optimizer"
fi
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \
    ${GPT_MODEL_ARGS[@]} \
    $TRAINING_ARGS --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --frobnicate 3 \
    --tokenizer-type GPT2BPETokenizer 2>&1 | tee log
"""


def values(imported) -> dict[str, object]:
    return {".".join(path): said.value for path, said in imported.values.items()}


def test_variables_arrays_and_arithmetic_of_a_script_are_expanded():
    options = options_of(words_of(SCRIPT))
    assert options["nproc_per_node"] == ["8"]
    assert options["nnodes"] == ["16"]
    assert options["global-batch-size"] == ["1536"]  # 8 * 16 * 12
    assert options["master_addr"][0] == "$MASTER_ADDR"


@pytest.mark.parametrize(
    "text",
    [
        "--num-layers 2 --bf16",
        "# only arguments\n--num-layers 2 \\\n  --bf16",
        'A="--num-layers 2"\nB=(--bf16)\nrun $A ${B[@]}',
        "ARGS=(--num-layers 2)\nARGS+=(--bf16)",
        'A=(\n  --num-layers 2  # layers\n  --bf16\n)\nrun "${A[@]}"',
        'A=(--num-layers 2)\nB=("${A[@]}" --bf16)\nrun "${B[@]}"',
    ],
)
def test_arguments_are_found_however_they_are_written(text):
    assert options_of(words_of(text)) == {"num-layers": ["2"], "bf16": []}


def test_what_a_script_takes_from_outside_comes_from_the_environment_or_set(tmp_path, monkeypatch):
    script = tmp_path / "train.sh"
    script.write_text(SCRIPT.replace("--num-layers 96", "--num-layers $LAYERS"))
    with pytest.raises(ScenarioError, match="which the script does not say"):
        import_scenario([str(script)])
    set_ = import_scenario([str(script)], None, ["cluster.node=dgx-h100", "model.num_hidden_layers=48"])
    assert "num_hidden_layers: 48" in set_.text
    monkeypatch.setenv("LAYERS", "32")
    assert "num_hidden_layers: 32" in import_scenario([str(script)], None, ["cluster.node=dgx-h100"]).text


def test_a_quote_that_does_not_end_is_no_traceback():
    assert "--num-layers" in words_of("run --num-layers 2 'oops")


def test_a_megatron_script_becomes_a_scenario():
    assert "parallelism.zero" not in values(read_megatron_args(SCRIPT))  # -n "$SP" does not hold
    said = values(read_megatron_args(SCRIPT, {"SP": "1"}))
    assert said["model.num_hidden_layers"] == 96
    assert said["model.intermediate_size"] == 4 * 12288
    assert said["model.vocab_size"] == 50257
    assert said["model.dropout"] == 0.1
    assert said["model.tie_word_embeddings"] is True
    assert said["cluster.num_gpus"] == 128
    assert said["parallelism.tp"] == 8
    assert said["parallelism.zero"] == 1
    assert said["parallelism.schedule"] == "1f1b"
    assert said["training.precision"] == "fp16"
    assert said["training.attention"] == "flash-2"
    assert said["training.gradient_clipping"] == 1.0


def test_what_is_not_understood_is_named_and_what_does_not_matter_is_not():
    assert read_megatron_args(SCRIPT).unread == ["--frobnicate"]
    changes = "--num-layers 2 --vocab-size 100 --no-bias-gelu-fusion --hybrid-override-pattern M-M --lr 1e-4"
    assert read_megatron_args(changes).unread == ["--no-bias-gelu-fusion", "--hybrid-override-pattern"]


BLOOM = (
    "--num-layers 70 --hidden-size 14336 --num-attention-heads 112 --embed-layernorm --vocab-size 250680 "
    "--seq-length 2048 --micro-batch-size 2 --bf16 --pipeline-model-parallel-size 12 --deepspeed "
)


def test_stages_that_count_embeddings_as_layers_have_one_layer_less_at_the_ends():
    """70 layers and two embeddings over 12 stages: 6 each (DeepSpeed's PipelineModule, as BLOOM was trained)."""
    said = read_megatron_args(BLOOM + "--pp-partition-method 'type:transformer|embedding'")
    assert values(said)["parallelism.layers_per_stage"] == [5, *[6] * 10, 5]
    assert values(said)["model.embedding_norm"] is True
    assert (said.notes, said.unread) == ([], [])


@pytest.mark.parametrize(
    ("method", "noted"), [("type:transformer", False), ("parameters", True), ("type:transformer|embedding", True)]
)
def test_stages_that_are_divided_otherwise_are_named(method: str, noted: bool):
    said = read_megatron_args(BLOOM.replace("layers 70", "layers 72") + f"--pp-partition-method '{method}'")
    assert "parallelism.layers_per_stage" not in values(said)
    assert [note.startswith(f"--pp-partition-method {method}: ") for note in said.notes] == [True] * noted


def test_a_llama_in_megatron_has_gates_groups_and_virtual_stages():
    said = values(read_megatron_args(
        "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --group-query-attention --num-query-groups 8 "
        "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
        "--untie-embeddings-and-output-weights --vocab-size 128256 --seq-length 8192 --micro-batch-size 1 --bf16 "
        "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 --hidden-dropout 0 "
        "--attention-dropout 0 --recompute-activations"
    ))  # fmt: skip
    assert said["model.num_key_value_heads"] == 8
    assert said["model.intermediate_size"] == 21824  # int(4 * 8192 * 2 / 3 / 64) * 64
    assert (said["model.norm"], said["model.position"], said["model.bias"]) == ("rmsnorm", "rope", False)
    assert (said["parallelism.schedule"], said["parallelism.vpp"]) == ("interleaved", 4)  # 80 / 4 / 5
    assert (said["model.dropout"], said["training.recompute"]) == (0.0, "selective")


def test_an_imported_scenario_loads_and_each_line_says_where_it_comes_from(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(SCRIPT)
    imported = import_scenario([str(script)], None, ["cluster.node=dgx-a100-80gb"], tmp_path)
    scenario = load_scenario_text(imported.text, "imported", simulate=False)
    assert (scenario.parallelism.tp, scenario.parallelism.pp, scenario.training.global_batch_size) == (8, 16, 1536)
    assert "hidden_size: 12288                    # --hidden-size" in imported.text
    assert "node: dgx-a100-80gb" in imported.text
    assert "# Not read: --frobnicate" in imported.text


def test_what_the_files_leave_open_is_asked_for_all_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ScenarioError) as error:
        import_scenario([str(tmp_path)])
    said = str(error.value)
    for path in ("cluster.node", "framework", "training.sequence_length", "training.micro_batch_size"):
        assert f"nothing says {path}" in said
        assert f"--set {path}=" in said


def test_a_models_directory_with_deepspeeds_settings(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "vocab_size": 1000})
    )  # fmt: skip
    (model / "ds_config.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    )
    (model / "generation_config.json").write_text("{}")
    sets = ["cluster.node=dgx-h100", "training.sequence_length=2048"]
    imported = import_scenario([str(model)], None, sets, tmp_path)
    scenario = load_scenario_text(imported.text, "imported", simulate=False, folder=tmp_path)
    assert (scenario.framework, scenario.parallelism.zero) == ("deepspeed", 2)
    assert (scenario.training.micro_batch_size, scenario.training.precision) == (4, "bf16")


BRANCHES = r"""#!/bin/bash
#SBATCH --nodes=16
#SBATCH --gres=gpu:a100:4
SIZE=39B   # one of 7.5B, 39B, 76B
if [ ${SIZE} == "7.5B" ]; then
    TP=4
    LAYERS=36
elif [ ${SIZE} == "39B" ]; then TP=8; LAYERS=48
    EXTRA="--num-layers-per-virtual-pipeline-stage 3"
else
    TP=1; LAYERS=12
fi
case $SIZE in
    7.5B|18B) HIDDEN=4096 ;;
    39B|76B)
        HIDDEN=8192
        ;;
    *) HIDDEN=1 ;;
esac
if [[ -n "${DEBUG}" ]]; then LAYERS=2; fi
if [ "$SLURM_NNODES" -gt 8 ] ; then PP=2; else PP=1; fi
if [ -f $FILE ]; then BATCH=1536; fi
srun torchrun --nnodes $SLURM_NNODES --nproc_per_node $SLURM_GPUS_ON_NODE pretrain_gpt.py $EXTRA \
  --num-layers $LAYERS --hidden-size $HIDDEN --tensor-model-parallel-size $TP --pipeline-model-parallel-size $PP \
  --global-batch-size ${BATCH} --seq-length $(( $UNKNOWN * 2 )) --bf16
"""


def test_branches_that_are_not_taken_change_nothing_and_slurm_says_how_many_nodes():
    options = options_of(words_of(BRANCHES))
    assert options["num-layers"] == ["48"]
    assert options["hidden-size"] == ["8192"]
    assert options["num-layers-per-virtual-pipeline-stage"][0] == "3"
    assert (options["tensor-model-parallel-size"], options["pipeline-model-parallel-size"]) == (["8"], ["2"])
    assert (options["nnodes"], options["nproc_per_node"][0]) == (["16"], "4")
    assert options["global-batch-size"] == ["1536"]  # whether a file exists is not known: it may
    assert options["seq-length"] == ["$(($UNKNOWN*2))"]
    assert options_of(words_of(BRANCHES, {"DEBUG": "1"}))["num-layers"] == ["2"]
    other = options_of(words_of(BRANCHES.replace("SIZE=39B", "SIZE=18B")))
    assert (other["num-layers"], other["hidden-size"]) == (["12"], ["4096"])


def test_a_script_of_megatron_deepspeed_is_deepspeeds():
    script = (
        "#   --nproc_per_node 4 \\\nGPUS=8\n# a comment does not go on \\\nN=48\n"
        'CMD=" --num-layers 70 --hidden-size 14336 --num-attention-heads 112 --position-embedding-type alibi \\\n'
        ' --checkpoint-activations --deepspeed-activation-checkpointing --tensor-model-parallel-size 4"\n'
        "srun torchrun --nproc_per_node $GPUS --nnodes $N pretrain_gpt.py $CMD --deepspeed --zero-stage 1 "
        "--deepspeed_config ds.json --kill-switch-path x --bf16\n"
    )
    said = read_megatron_args(script)
    assert values(said)["framework"] == "deepspeed"
    assert values(said)["parallelism.zero"] == 1
    assert values(said)["cluster.num_gpus"] == 8 * 48
    assert values(said)["model.position"] == "alibi"
    assert values(said)["training.recompute"] == "full"
    assert not said.unread
    assert said.notes == ["--deepspeed_config ds.json is not read: name that file too"]
    assert "megatron.create_attention_mask_in_dataloader" not in values(said)


@pytest.mark.parametrize(
    ("script", "threads"),
    [
        ("export OMP_NUM_THREADS=8\ntorchrun --nproc_per_node 8 {}", 8),
        ("T=4\nOMP_NUM_THREADS=$T torchrun --nproc_per_node 8 {}", 4),
        ("torchrun --nproc_per_node 8 {}", 1),
        ("python -m torch.distributed.run --nproc-per-node 8 {}", 1),
        ("torchrun --nproc_per_node 1 {}", None),
        ("deepspeed {}", None),
    ],
)
def test_threads_are_those_of_the_script_or_of_its_launcher(script, threads):
    """torchrun sets OMP_NUM_THREADS=1 where there are several processes a node; the deepspeed launcher sets nothing."""
    text = script.format("pretrain_gpt.py --num-layers 4 --deepspeed --zero-stage 2 --bf16\n")
    assert values(read_megatron_args(text)).get("training.cpu_threads") == threads


def test_threads_that_only_the_machine_knows_are_said():
    text = "OMP_NUM_THREADS=$(nproc) torchrun pretrain_gpt.py --num-layers 4 --deepspeed --zero-stage 2 --bf16\n"
    said = read_megatron_args(text)
    assert "training.cpu_threads" not in values(said)
    assert any("OMP_NUM_THREADS" in note for note in said.notes)


@pytest.mark.parametrize(
    "launcher", ["torchrun pretrain_gpt.py", "deepspeed pretrain_gpt.py --deepspeed --zero-stage 1"]
)
def test_sums_of_input_gradients_that_are_waited_for_are_said_so(launcher, tmp_path):
    script = (
        f"{launcher} --num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --micro-batch-size 1 "
        "--global-batch-size 8 --tensor-model-parallel-size 4 --vocab-size 1024 --bf16 "
        "--no-async-tensor-model-parallel-allreduce --max-position-embeddings 512"
    )
    imported = import_scenario([], script, ["cluster.node=dgx-h100", "cluster.num_nodes=1"], tmp_path)
    scenario = load_scenario_text(imported.text, "imported", folder=tmp_path)
    assert "async_tensor_model_parallel_allreduce: false" in imported.text
    assert scenario.parallelism.tp == 4


def test_a_script_reads_in_the_file_beside_it(tmp_path):
    (tmp_path / "sizes.sh").write_text('ARGS="--num-layers ${N} --hidden-size 512 --seq-length 128"\n')
    (tmp_path / "run.sh").write_text("N=7\n. `pwd`/sizes.sh\nsource missing.sh\npython pretrain_gpt.py $ARGS --bf16\n")
    said = values(read_megatron_args((tmp_path / "run.sh").read_text(), {}, tmp_path))
    assert (said["model.num_hidden_layers"], said["model.vocab_size"]) == (7, 50257)  # pretrain_gpt.py's tokenizer


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Llama-3.1-8B-Instruct", 128256),
        ("--tokenizer-type PretrainedFromHF --tokenizer-name-or-path x --pad-vocab-size-to 250880", 250880),
        ("--vocab-file a.json --merge-file merges.txt", 50257),
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model somebody/else", None),
    ],
)
def test_the_vocabulary_is_that_of_a_known_tokenizer(words: str, size: int | None):
    said = values(read_megatron_args(f"--num-layers 2 --hidden-size 64 {words}"))
    assert said.get("model.vocab_size") == size


def test_the_gpus_follow_from_deepspeeds_three_batches(tmp_path):
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 256, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}'
    )
    sets = ["model=gpt2", "cluster.node=dgx-h100", "training.sequence_length=1024"]
    imported = import_scenario([str(tmp_path / "ds.json")], None, sets, tmp_path)
    assert load_scenario_text(imported.text, "imported", folder=tmp_path).cluster.num_gpus == 32


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ("[float8]\nenable_fsdp_float8_all_gather = true\n", "bf16"),  # as torchtitan's own files have it, unused
        ("[float8]\nenable_float8_linear = false\n", "bf16"),
        ("[float8]\nenable_float8_linear = true\nenable_fsdp_float8_all_gather = true\n", "fp8"),
        ("[training]\nenable_fp8_linear = true\n", "fp8"),
        ("[quantize.linear.float8]\nfilter_fqns = ['output']\n", "bf16"),
    ],
)
def test_torchtitan_computes_in_8_bits_where_a_converter_or_a_switch_says_so(words: str, precision: str):
    said = values(read_torchtitan(f'[model]\nname = "llama3"\nflavor = "8B"\n{words}'))
    assert said["training.precision"] == precision
    assert said.get("fsdp2.float8_all_gather") == (True if "all_gather" in words and precision == "fp8" else None)


def test_a_torchtitan_job(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(
        '[model]\nname = "llama3"\nflavor = "8B"\nconverters = ["float8"]\n'
        "[training]\nlocal_batch_size = 2\nseq_len = 8192\n"
        "[parallelism]\ndata_parallel_shard_degree = 4\ndata_parallel_replicate_degree = 2\n"
        "tensor_parallel_degree = 8\n"
        'pipeline_parallel_degree = 2\npipeline_parallel_schedule = "Interleaved1F1B"\n'
        '[activation_checkpoint]\nmode = "full"\n[compile]\nenable = true\n[mystery]\nx = 1\n'
    )
    imported = import_scenario([str(job)], None, ["cluster.node=dgx-h100"])
    for line in ("model: llama-3.1-8b", "dp: 8", "tp: 8", "pp: 2", "schedule: interleaved", "shard_size: 4",
                 "precision: fp8", "recompute: full", "compile: true", "loss: compiled",
                 "micro_batch_size: 2"):  # fmt: skip
        assert line in imported.text
    assert imported.unread == ("[mystery]",)


def test_keys_that_sim_does_not_know_in_sections_that_it_reads_are_told():
    said = read_torchtitan(
        '[model]\nname = "llama3"\nflavor = "8B"\ntokenizer_path = "x"\nmystery = 1\n'
        '[training]\nsteps = 10\nseq_len = 8192\nmixed_precision_reduce = "bfloat16"\n'
        "[parallelism]\ntensor_parallel_degree = 2\nsome_new_degree = 4\ndisable_loss_parallel = false\n"
        '[optimizer]\nlr = 3e-4\nearly_step_in_backward = true\n[quantize.linear.float8]\nrecipe_name = "rowwise"\n'
    )
    assert said.unread == [
        "model.mystery", "training.mixed_precision_reduce", "parallelism.some_new_degree",
        "optimizer.early_step_in_backward",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "key", "said"),
    [
        ("MEGATRON_LM", "megatron_lm_num_micro_batches: 4", "is to be 4 x micro_batch_size x dp"),
        ("MEGATRON_LM", "megatron_lm_num_micro_batches: 1", ""),
        ("DEEPSPEED", "gradient_accumulation_steps: 4", "is to be 4 x micro_batch_size x ranks"),
        ("DEEPSPEED", "gradient_accumulation_steps: 1", ""),
    ],
)
def test_how_many_microbatches_accelerate_makes_is_a_note(tmp_path, kind: str, key: str, said: str):
    """Its file says how many, a scenario how large the batch is: the ranks are the user's to say."""
    section = "megatron_lm_config" if kind == "MEGATRON_LM" else "deepspeed_config"
    file = tmp_path / "accelerate.yaml"
    file.write_text(f"distributed_type: {kind}\nmixed_precision: bf16\nnum_processes: 8\n{section}: {{{key}}}\n")
    sets = ["model=llama-2-7b", "cluster.node=dgx-h100", "training.sequence_length=2048", "training.micro_batch_size=1"]
    notes = [note for note in import_scenario([str(file)], None, sets).notes if "global_batch_size" in note]
    assert len(notes) == bool(said)
    assert all(said in note and key.partition(":")[0] in note for note in notes)


def test_torchtitans_recompute_of_every_second_layer_and_a_loss_that_is_not_compiled(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(
        '[model]\nname = "llama3"\nflavor = "8B"\n[training]\nbatch_size = 1\nseq_len = 8192\ncompile = true\n'
        '[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "2"\n'
    )
    imported = import_scenario([str(job)], None, ["cluster.node=dgx-h100"])
    for line in ("recompute: full", "recompute_interval: 2", "compile: true"):
        assert line in imported.text
    assert "loss:" not in imported.text


def test_an_accelerate_configuration_with_a_models_config(tmp_path):
    (tmp_path / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 8\n"
        "fsdp_config: {fsdp_sharding_strategy: SHARD_GRAD_OP, fsdp_activation_checkpointing: true}\n"
    )
    sets = ["model=llama-2-7b", "cluster.node=dgx-h100", "training.sequence_length=2048", "training.micro_batch_size=1"]
    imported = import_scenario([str(tmp_path / "accelerate.yaml")], None, sets)
    scenario = load_scenario_text(imported.text, "imported", simulate=False)
    assert (scenario.framework, scenario.parallelism.zero, scenario.cluster.num_gpus) == ("fsdp1", 2, 8)
    assert (scenario.training.recompute, scenario.training.code) == ("full", "huggingface")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.sh", "echo hello\n", "has no --num-layers"),
        ("a.sh", "run --num-layers $LAYERS --bf16\n", "--num-layers is $LAYERS, which the script does not say"),
        ("a.sh", "run --num-layers two --bf16\n", "--num-layers 'two' is not a number"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "is not a mapping"),
        ("a.json", '{"a": 1}', "is neither a model's config.json nor a ds_config.json"),
        ("a.toml", "[model", "is not TOML"),
        ("a.toml", "[x]\ny = 1\n", "has neither [model] nor [training]"),
        ("a.yaml", "model: llama-2-7b\ncluster: {node: dgx-h100}\n", "is a scenario already"),
        ("a.yaml", "distributed_type: TPU\n", "distributed_type 'TPU' is not one that sim knows"),
    ],
)
def test_a_file_that_is_something_else_is_told_so(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ScenarioError) as error:
        import_scenario([str(path)])
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_nothing_to_import_is_told_so():
    with pytest.raises(ScenarioError, match="nothing to import"):
        import_scenario([])


def test_init_asks_again_until_the_answer_is_good_and_writes_what_loads():
    answers = iter(
        ["llama-9", "llama-3.1-8b", "dgx-h200", "16", "megatron", "", "2", "1", "4096", "1", "bf16", "none", ""]
    )
    said: list[str] = []

    def ask(question: str, default: str) -> str:
        return next(answers) or default

    scenario = load_scenario_text(ask_scenario(ask, said.append), "asked", simulate=False)
    assert any("unknown model 'llama-9'" in words for words in said)
    assert (scenario.framework, scenario.parallelism.zero, scenario.parallelism.tp) == ("megatron", 1, 2)
    assert scenario.training.global_batch_size == 8  # 16 GPUs / tp 2, one microbatch each


def test_a_megatron_script_that_does_not_overlap_says_so():
    path = ("megatron", "overlap_grad_reduce")
    assert read_megatron_args("--num-layers 32 --use-distributed-optimizer").values[path].value is False
    assert read_megatron_args("--num-layers 32 --use-distributed-optimizer --overlap-grad-reduce").values[path].value
    assert path not in read_megatron_args("--num-layers 32").values
    assert path not in read_megatron_args("--num-layers 32 --deepspeed --zero-stage 1").values


def test_what_a_megatron_script_keeps_elsewhere():
    options = "--num-layers 32 --cpu-offloading-num-layers 8 --distribute-saved-activations"
    said = read_megatron_args(options).values
    assert said["megatron", "cpu_offloading_num_layers"].value == 8
    assert said["megatron", "distribute_saved_activations"].value is True


@pytest.mark.parametrize(
    ("options", "impl", "scope"),
    [
        ("--enable-cuda-graph", "local", None),
        ("--cuda-graph-impl transformer_engine", "transformer_engine", None),
        ("--cuda-graph-impl local --cuda-graph-scope full_iteration", "local", "full_iteration"),
        ("--cuda-graph-impl full_iteration", "local", "full_iteration"),
        ("--cuda-graph-impl none", None, None),
    ],
)
def test_cuda_graphs_of_a_megatron_script(options: str, impl: str | None, scope: str | None):
    said = read_megatron_args(f"--num-layers 32 {options}").values
    found = [said.get(("megatron", name)) for name in ("cuda_graph_impl", "cuda_graph_scope")]
    assert [None if value is None else value.value for value in found] == [impl, scope]


def test_ranks_of_a_script_that_count_through_the_pipeline_first():
    said = read_megatron_args("--num-layers 32 --use-tp-pp-dp-mapping").values
    assert said["parallelism", "order"].value == "tp-cp-pp-dp"


def test_the_data_parallel_degree_of_torchtitan_before_hsdp():
    """A job of 2024: ``data_parallel_degree`` where ``data_parallel_shard_degree`` stands today."""
    job = '[model]\nname = "llama3"\nflavor = "8B"\n[training]\ndata_parallel_degree = {}\ntensor_parallel_degree = 2\n'
    assert values(read_torchtitan(job.format(8)))["parallelism.dp"] == 8
    assert "parallelism.dp" not in values(read_torchtitan(job.format(-1)))  # all GPUs that are left
