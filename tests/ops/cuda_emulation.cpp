// Runs the kernels of cuda_kernels.cu on a CPU, one block, one warp and one lane after the other, from barrier to barrier.
// tests/ops/test_cuda.py compiles it with the constants of the kernels, and calls the function at the end.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EMULATED
#define DEVICE inline
#define KERNEL extern "C" void

constexpr int THREADS = 32 * WARPS;
struct Dimension {
  int x;
};
static Dimension threadIdx, blockIdx;  // of the lane that runs
static char* shared_memory;            // of the block that runs

enum State { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, DONE };
static State states_of[THREADS];
static ucontext_t lanes[THREADS], scheduler;

static void stop(State state) {
  int lane = threadIdx.x;
  states_of[lane] = state;
  swapcontext(&lanes[lane], &scheduler);
}
inline void warp_barrier() { stop(WAITS_FOR_WARP); }
inline void block_barrier() { stop(WAITS_FOR_BLOCK); }

// Let those go on that wait for a barrier which all have reached.
static bool release(State barrier, int first, int count) {
  for (int i = first; i < first + count; i++)
    if (states_of[i] != barrier) return false;
  for (int i = first; i < first + count; i++) states_of[i] = RUNS;
  return true;
}
static void run_lanes(void (*kernel)()) {
  constexpr int STACK = 1 << 16;
  static std::vector<char> stacks(THREADS * STACK);
  for (int i = 0; i < THREADS; i++) {
    states_of[i] = RUNS;
    getcontext(&lanes[i]);
    lanes[i].uc_stack.ss_sp = &stacks[i * STACK];
    lanes[i].uc_stack.ss_size = STACK;
    makecontext(&lanes[i], kernel, 0);
  }
  for (bool down = false;; down = !down) {  // a barrier that is missing shows in one of both orders
    for (int warp = 0; warp < WARPS; warp++)
      do
        for (int i = 0; i < 32; i++) {
          int lane = threadIdx.x = 32 * warp + (down ? 31 - i : i);
          if (states_of[lane] == RUNS) swapcontext(&scheduler, &lanes[lane]);
        }
      while (release(WAITS_FOR_WARP, 32 * warp, 32));
    bool released = release(WAITS_FOR_BLOCK, 0, THREADS), done = true;
    for (State state : states_of) done &= state == DONE;
    if (done) return;
    if (!released) fputs("lanes wait for different barriers\n", stderr), abort();
  }
}

inline unsigned bits_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of_bits(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float exp2_of(float x) { return exp2f(x); }
inline float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
inline float max_of(float a, float b) { return fmaxf(a, b); }
inline float abs_of(float x) { return fabsf(x); }
inline unsigned short to_bf16(float x) {
  if (x != x) return 0x7fff;
  unsigned bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Copies of every other block arrive at once, those of the others when they are waited for: neither a wait that is
// missing nor what still reads the place goes unseen.
struct Copy {
  void* to;
  const void* from;
  bool exists;
};
static std::vector<std::vector<Copy>> stages[THREADS];  // of a lane; the last one is still open
static void arrive(const Copy& copy) {
  if (copy.exists) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}
inline void begin_copy(void* to, const void* from, bool exists) {
  if (((uintptr_t)to | (uintptr_t)from) % 16) fputs("a copy is not aligned\n", stderr), abort();
  if (blockIdx.x % 2) arrive({to, from, exists});
  else stages[threadIdx.x].back().push_back({to, from, exists});
}
inline void end_of_stage() { stages[threadIdx.x].emplace_back(); }
inline void wait_for_previous_stage() {
  auto& mine = stages[threadIdx.x];
  for (; mine.size() > 2; mine.erase(mine.begin()))
    for (Copy& copy : mine[0]) arrive(copy);
}

// The product of a warp. Numbers of a and b are cut to the 10 bits of tf32, as the hardware does.
inline void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1, const float (&c)[4]) {
  static float exchange[THREADS][6];
  int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  auto* of_warp = &exchange[threadIdx.x - lane];
  float mine[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; i++) of_warp[lane][i] = float_of_bits(bits_of(mine[i]) & 0xffffe000u);
  warp_barrier();
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, column = 2 * q + i % 2;
    d[i] = c[i];
    for (int k = 0; k < 8; k++)
      d[i] += of_warp[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2] * of_warp[column * 4 + k % 4][4 + k / 4];
  }
  warp_barrier();  // the next product may write
}

#include "../../ops/backends/cuda_kernels.cu"

static const Args* arguments;
static bool forward;
static void run_lane() {
  forward ? scan_forward(*arguments) : scan_backward(*arguments);
  stop(DONE);
}
extern "C" void run(bool runs_forward, int blocks, const Args* args) {
  arguments = args, forward = runs_forward;
  std::vector<Bits128> memory((forward ? SCAN_FORWARD_BYTES : SCAN_BACKWARD_BYTES) / 16);
  shared_memory = (char*)memory.data();
  for (int block = 0; block < blocks; block++) {
    memset(shared_memory, 0xff, memory.size() * 16);  // not a number, until it is written
    for (auto& stage : stages) stage.assign(1, {});
    blockIdx.x = block;
    run_lanes(run_lane);
  }
}
