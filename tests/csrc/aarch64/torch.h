// The part of LibTorch's stable ABI that csrc/cpu/library.cpp needs, for a machine without torch. A call on standard
// input brings the tensors, and they are returned on standard output. emulate.py is the other end.
// A call is the name of the operator, then for each argument a byte (0 for None) and the value. A reply is a byte: 1
// for an error, followed by its message; or 0, followed by the memory of every tensor and, if the operator returns a
// number, that number.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) torch::fail(__VA_ARGS__)

namespace torch {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline void read(void* to, std::size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the caller has closed the pipe
}

template <class T>
T take() {
  T value;
  read(&value, sizeof value);
  return value;
}

template <class T>
void give(T value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

inline std::string take_text() {
  std::string text(take<int64_t>(), ' ');
  read(text.data(), text.size());
  return text;
}

inline void give_text(const std::string& text) {
  give<int64_t>(text.size());
  std::fwrite(text.data(), 1, text.size(), stdout);
}

namespace headeronly {
enum class ScalarType : int64_t { Half, BFloat16, Float, Double, Int, Long };
}

namespace stable {

// Its memory is exactly the part that its sizes and strides reach.
class Tensor {
 public:
  static Tensor taken() {
    Tensor x;
    x.type_ = take<headeronly::ScalarType>();
    x.sizes_.resize(take<int64_t>());
    x.strides_.resize(x.sizes_.size());
    for (auto* list : {&x.sizes_, &x.strides_})
      for (int64_t& value : *list) value = take<int64_t>();
    x.memory_ = std::make_shared<std::vector<char>>(take<int64_t>());
    read(x.memory_->data(), x.memory_->size());
    return x;
  }

  void give_back() const { std::fwrite(memory_->data(), 1, memory_->size(), stdout); }

  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  headeronly::ScalarType scalar_type() const { return type_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_.at(i); }
  int64_t stride(int64_t i) const { return strides_.at(i); }
  const void* const_data_ptr() const { return memory_->empty() ? nullptr : memory_->data(); }
  void* mutable_data_ptr() const { return const_cast<void*>(const_data_ptr()); }

  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim() - 1; i >= 0; step *= sizes_[i--])
      if (sizes_[i] != 1 && strides_[i] != step && numel() != 0) return false;
    return true;
  }

 private:
  headeronly::ScalarType type_;
  std::vector<int64_t> sizes_, strides_;
  std::shared_ptr<std::vector<char>> memory_;
};

inline int64_t get_num_threads() { return 1; }

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
  if (begin < end) work(begin, end);
}

}  // namespace stable

using Optional = std::optional<stable::Tensor>;

template <class T>
struct Argument {
  static T taken() {
    take<uint8_t>();
    return take<T>();
  }
};
template <>
struct Argument<Optional> {
  static Optional taken() { return take<uint8_t>() ? Optional(stable::Tensor::taken()) : std::nullopt; }
};
template <>
struct Argument<stable::Tensor> {
  static stable::Tensor taken() { return *Argument<Optional>::taken(); }
};

template <class T>
void give_back(const T& argument) {
  if constexpr (std::is_same_v<T, stable::Tensor>) argument.give_back();
  if constexpr (std::is_same_v<T, Optional>)
    if (argument.has_value()) argument->give_back();
}

template <class Result, class... Arguments>
std::function<void()> boxed(Result (*f)(Arguments...)) {
  return [f] {
    std::tuple<Arguments...> arguments{Argument<Arguments>::taken()...};
    const auto finish = [&arguments] {
      give<uint8_t>(0);
      std::apply([](const auto&... each) { (give_back(each), ...); }, arguments);
    };
    if constexpr (std::is_void_v<Result>) {
      std::apply(f, arguments);
      finish();
    } else {
      const Result result = std::apply(f, arguments);
      finish();
      give(result);
    }
  };
}

struct Library {
  std::vector<std::string> schemas;
  std::map<std::string, std::function<void()>> operators;

  void def(const char* schema) { schemas.push_back(schema); }
  void impl(const char* name, std::function<void()> f) { operators[name] = std::move(f); }
};

}  // namespace torch

#define TORCH_BOX(f) torch::boxed(f)
#define STABLE_TORCH_LIBRARY(name, m) void define_operators(torch::Library& m)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) void implement_operators(torch::Library& m)
