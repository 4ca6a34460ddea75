// The C++ core without Python, for machines of which there is only an emulator:
//     driver gumbel_noise|soft_token|indexed_dot IN OUT
// IN holds the sizes (int64) and the bytes of the arguments, OUT gets those of the results, all in
// the order of this code. The other end is tests/kernels/test_neon.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "gumbel_noise.h"
#include "indexed_dot.h"
#include "soft_token.h"

namespace {

using namespace softgrpo;

// What an op has to write is never zero beforehand.
constexpr unsigned char kPoison = 0xAB;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

// Every array has a heap block of its own: aligned, and not followed by another one.
class Input {
 public:
  explicit Input(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) fail(path);
  }
  ~Input() { std::fclose(file_); }

  int64_t size() {
    int64_t value;
    read(&value, sizeof value);
    return value;
  }

  // Null where there is nothing.
  template <class T>
  const T* array(int64_t bytes) {
    if (bytes == 0) return nullptr;
    void* block = std::malloc(bytes);
    read(block, bytes);
    return static_cast<const T*>(block);
  }

 private:
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, file_) != bytes) fail("IN is too short");
  }

  std::FILE* file_;
};

class Output {
 public:
  template <class T>
  T* array(int64_t bytes) {
    void* block = std::malloc(bytes);
    std::memset(block, kPoison, bytes);
    blocks_.push_back({block, static_cast<size_t>(bytes)});
    return static_cast<T*>(block);
  }

  void write(const char* path) const {
    std::FILE* file = std::fopen(path, "wb");
    if (!file) fail(path);
    for (const Block& block : blocks_)
      if (std::fwrite(block.data, 1, block.bytes, file) != block.bytes) fail("OUT is not writable");
    if (std::fclose(file) != 0) fail("OUT is not writable");
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::vector<Block> blocks_;
};

int64_t bytes_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

void run_gumbel_noise(Input& in, Output& out) {
  const int64_t rows = in.size(), width = in.size();
  GumbelNoise args;
  args.rows = rows;
  args.width = width;
  args.ids = in.array<int32_t>(rows * width * 4);
  args.seed = in.array<int64_t>(rows * 8);
  args.position = in.array<int64_t>(rows * 8);
  args.uid = in.array<int64_t>(rows * 8);
  args.stream = in.array<int64_t>(rows * 8);
  args.out = out.array<float>(rows * width * 4);
  gumbel_noise(args);
}

void run_soft_token(Input& in, Output& out) {
  SoftTokenArgs args = {};
  const int64_t rows = args.rows = in.size();
  const int64_t vocabulary = args.vocabulary = args.logits_stride = in.size();
  const int64_t slots = args.k_max = in.size();
  args.terminal_width = in.size();
  const int64_t width = in.size();
  args.joint = in.size() != 0;
  args.logits_dtype = static_cast<Dtype>(in.size());
  const int64_t bytes = bytes_of(args.logits_dtype);
  args.logits = in.array<void>(rows * vocabulary * bytes);
  args.embed = {in.array<void>(vocabulary * width * bytes), width, width, args.logits_dtype};
  args.floats = in.array<float>(kFloatColumns * rows * 4);
  args.ints = in.array<int64_t>(kIntColumns * rows * 8);
  args.terminal_ids = in.array<int32_t>(rows * args.terminal_width * 4);
  args.logit_scale = 1.0f;
  args.ids = out.array<int32_t>(rows * slots * 4);
  args.gprime = out.array<float>(rows * slots * 4);
  args.weights = out.array<float>(rows * slots * 4);
  args.logp = out.array<float>(rows * slots * 4);
  args.n = out.array<int32_t>(rows * 4);
  args.token = out.array<int32_t>(rows * 4);
  args.token_logp = out.array<float>(rows * 4);
  args.kind = out.array<uint8_t>(rows);
  args.embed_out = out.array<void>(rows * width * bytes);
  args.lse = out.array<float>(rows * 4);
  args.entropy = out.array<float>(rows * 4);
  args.kept_mass = out.array<float>(rows * 4);
  args.valid = out.array<bool>(rows);
  soft_token(args);
}

void run_indexed_dot(Input& in, Output& out) {
  IndexedDot args;
  args.rows = in.size();
  args.slots = in.size();
  const int64_t vocabulary = in.size(), width = in.size();
  const auto dtype = static_cast<Dtype>(in.size());
  args.hidden = in.array<void>(args.rows * width * bytes_of(dtype));
  args.hidden_stride = width;
  args.table = {in.array<void>(vocabulary * width * bytes_of(dtype)), width, width, dtype};
  args.ids = in.array<int32_t>(args.rows * args.slots * 4);
  args.out = out.array<float>(args.rows * args.slots * 4);
  indexed_dot(args);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("wants OP IN OUT");
  Input in(argv[2]);
  Output out;
  if (!std::strcmp(argv[1], "gumbel_noise"))
    run_gumbel_noise(in, out);
  else if (!std::strcmp(argv[1], "soft_token"))
    run_soft_token(in, out);
  else if (!std::strcmp(argv[1], "indexed_dot"))
    run_indexed_dot(in, out);
  else
    fail("no such op");
  out.write(argv[3]);
}
