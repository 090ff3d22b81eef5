#!/usr/bin/env bash
# Vulkan on the CPU (Mesa's lavapipe), to test device buffers without a GPU. Debian 12, as root; the build takes 5-10 minutes.
#   scripts/setup_vulkan.sh [FOLDER]
# installs driver, loader and shader compiler, unpacks newer Vulkan headers and a newer lavapipe into FOLDER, and says how
# to build and test.
set -euo pipefail
folder=$(realpath -m "${1:-$HOME/.cache/kvcompose-gguf/vulkan}")
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    mesa-vulkan-drivers libvulkan-dev glslc spirv-headers vulkan-tools g++ >/dev/null

# Debian 12's headers lack VK_EXT_layer_settings, which ggml-vulkan.cpp uses, and its lavapipe (Mesa 22.3) crashes in graphs
# with scores: both newer, unpacked only, by an apt configuration of its own, so that the system's stays as it is
mkdir -p "$folder"/lists/partial "$folder"/cache/archives/partial
mirror=$(sed -n 's/^URIs: *\(.*\/debian\)\/*$/\1/p' /etc/apt/sources.list.d/debian.sources | head -1)
printf 'Types: deb\nURIs: %s\nSuites: trixie bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
    "$mirror" >"$folder/next.sources"
next=(apt-get -o "Dir::Etc::SourceList=$folder/next.sources" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$folder/lists"
    -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root -qq)
cd "$folder"
"${next[@]}" update
[ -f headers/usr/include/vulkan/vulkan.hpp ] || { "${next[@]}" download libvulkan-dev/trixie && dpkg -x libvulkan-dev_*.deb headers; }
[ -d mesa ] || { "${next[@]}" download mesa-vulkan-drivers/bookworm-backports && dpkg -x mesa-vulkan-drivers_*.deb mesa; }
driver=$(find "$folder/mesa" -name 'libvulkan_lvp.so' | head -1)
sed "s#\"library_path\": \".*\"#\"library_path\": \"$driver\"#" mesa/usr/share/vulkan/icd.d/lvp_icd*.json >"$folder/lavapipe.json"

export VK_DRIVER_FILES=$folder/lavapipe.json
vulkaninfo --summary 2>/dev/null | grep deviceName
echo "build: CMAKE_ARGS=\"-DGGML_VULKAN=on -DVulkan_INCLUDE_DIR=$folder/headers/usr/include\" python scripts/build_native.py"
echo "test:  VK_DRIVER_FILES=$VK_DRIVER_FILES python -m pytest tests/native/test_vulkan.py"
