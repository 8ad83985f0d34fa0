// Runs the operators of csrc/cpu/library.cpp without torch: prints their schemas, then answers calls until the input
// ends.
#include "torch.h"

void define_operators(torch::Library&);
void implement_operators(torch::Library&);

int main() {
  torch::Library library;
  define_operators(library);
  implement_operators(library);
  torch::give<int64_t>(library.schemas.size());
  for (const std::string& schema : library.schemas) torch::give_text(schema);
  for (;;) {
    std::fflush(stdout);
    const auto& run = library.operators.at(torch::take_text());
    try {
      run();
    } catch (const std::exception& error) {
      torch::give<uint8_t>(1);
      torch::give_text(error.what());
    }
  }
}
