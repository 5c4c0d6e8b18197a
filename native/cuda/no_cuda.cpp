// Stands for the CUDA backend in a build without it.
#include "cuda/loader.h"

namespace tw::cuda {

bool built() { return false; }

std::string status() { return "built without CUDA"; }

}  // namespace tw::cuda
