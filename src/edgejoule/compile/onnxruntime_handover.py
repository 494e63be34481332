"""How a compiled ONNX file runs without edgejoule: templates of an install line, Python and C++. Runs nothing."""

from __future__ import annotations

INSTALL = "pip install {package} numpy pillow"

PYTHON = """\
import onnxruntime
options = onnxruntime.SessionOptions()
{config}session = onnxruntime.InferenceSession("{file}", options, providers={providers})
def run(images):  # float32 (B, C, H, W), normalised -> logits (B, K)
    return session.run(["logits"], {{"images": images}})[0]
"""

# g++ -std=c++17 -I include run.cpp -lonnxruntime, with the headers and the library of an onnxruntime release
CPP = """\
#include <onnxruntime_cxx_api.h>
#include <vector>

std::vector<float> run(std::vector<float>& images) {{  // (B, C, H, W), normalised -> logits (B, K)
  static Ort::Env env;
  static Ort::SessionOptions options;
{config}  static Ort::Session session(env, ORT_TSTR("{file}"), options);
  const int64_t shape[] = {{{shape}}};
  const char *inputs[] = {{"images"}}, *outputs[] = {{"logits"}};
  auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = Ort::Value::CreateTensor<float>(cpu, images.data(), images.size(), shape, 4);
  auto logits = std::move(session.Run(Ort::RunOptions{{}}, inputs, &tensor, 1, outputs, 1)[0]);
  const float* first = logits.GetTensorData<float>();
  return {{first, first + logits.GetTensorTypeAndShapeInfo().GetElementCount()}};
}}
"""
