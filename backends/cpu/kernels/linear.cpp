#include "kernels/linear.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstring>
#include <vector>

#include "kernels/isa.h"
#include "kernels/numbers.h"
#include "kernels/scratch.h"
#include "kernels/threads.h"

namespace edgeq {
namespace {

// --- quantized activations -------------------------------------------------------------------------------------------

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One quantization of an input; several matrices may use it.
struct Quantized {
    int group;
    Order order;
    Activations a;
    ScratchVector<char> memory;

    bool serves(const Matrix& w, Order needed) const { return w.group == group && order == needed; }
};

void quantize(const float* x, int64_t tokens, int64_t in, int group, Order order, Quantized& result) {
    Activations& a = result.a;
    const int block = order == Order::quarters ? quarters_block : even_odd_block;
    a = {x, nullptr, nullptr, nullptr, nullptr, tokens, in, round_up(in, block), round_up(in / group, 16)};
    result.group = group;
    result.order = order;
    const int64_t codes = tokens * a.stride, numbers = tokens * a.groups * 4;
    make_room(result.memory, codes + 3 * numbers);
    char* p = result.memory.data();
    auto* q = reinterpret_cast<int8_t*>(p);
    auto* scales = reinterpret_cast<float*>(p + codes);
    auto* sums = reinterpret_cast<float*>(p + codes + numbers);
    auto* totals = reinterpret_cast<int32_t*>(p + codes + 2 * numbers);
    a.codes = q, a.scales = scales, a.sums = sums, a.totals = totals;

    const bool padded = a.stride != in || a.groups != in / group;
    const LinearKernels& kernels = linear_kernels();
    auto rows = [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t++) {
            if (padded) {
                std::memset(q + t * a.stride, 0, a.stride);
                for (void* row :
                     {(void*)(scales + t * a.groups), (void*)(sums + t * a.groups), (void*)(totals + t * a.groups)})
                    std::memset(row, 0, a.groups * 4);
            }
            kernels.quantize(x + t * in, in, group, order, q + t * a.stride, scales + t * a.groups, sums + t * a.groups,
                             totals + t * a.groups);
        }
    };
    const int64_t piece = std::max<int64_t>(1, 65536 / in);  // tokens; some 10 microseconds
    if (tokens <= piece) return rows(0, tokens);
    parallel_for(int((tokens + piece - 1) / piece), [&](int i) { rows(i * piece, std::min(tokens, (i + 1) * piece)); });
}

// Scratch of the calling thread, kept from call to call. It holds one int8 copy of the largest input per layout.
thread_local std::vector<Quantized> scratch;

const Activations* quantized_for(const Matrix& w, Order order, const float* x, int64_t tokens, size_t& used) {
    for (size_t i = 0; i < used; i++)
        if (scratch[i].serves(w, order)) return &scratch[i].a;
    assert(used < scratch.size());
    quantize(x, tokens, w.in, w.group, order, scratch[used]);
    return &scratch[used++].a;
}

// --- pieces of work --------------------------------------------------------------------------------------------------

// The part of one matrix that a piece works on: rows [i * rows, (i + 1) * rows) by a block of tokens.
struct Job {
    const Matrix* w;
    const Activations* a;
    float* y;
    int64_t rows;                 // in a piece
    int row_pieces, first_piece;  // of its rows, for one block of tokens
};

constexpr int64_t token_block = 512;   // of a gemm piece: its activations stay in the second-level cache
constexpr int64_t least_tokens = 128;  // of one: fewer do not pay for unpacking its weights

// Tokens of a gemm piece: fewer where there are so few rows that the threads would not end together.
int64_t gemm_tokens(int64_t tokens, int row_pieces) {
    int64_t block = std::min(tokens, token_block);
    while (block >= 2 * least_tokens && row_pieces * ((tokens + block - 1) / block) < 8 * thread_count())
        block = (block + 1) / 2;
    return block;
}

// Bytes of weights in a piece of gemv: 8 pieces for a thread, no smaller than what a thread streams in a microsecond.
int64_t gemv_piece_nbytes(const Matrix* ws, int count) {
    int64_t nbytes = 0;
    for (int i = 0; i < count; i++) nbytes += ws[i].out * int64_t(row_nbytes(ws[i]));
    return std::clamp<int64_t>(nbytes / (8 * thread_count()), 16 << 10, 256 << 10);
}

}  // namespace

void release_linear_scratch() { std::vector<Quantized>().swap(scratch); }

size_t type_size(Type type) { return type == Type::f32 ? 4 : type == Type::f16 || type == Type::bf16 ? 2 : 1; }

size_t row_nbytes(const Matrix& w) { return w.bits ? size_t(w.in) * w.bits / 8 : size_t(w.in) * type_size(w.type); }

const LinearKernels& linear_kernels() {
    switch (active_isa()) {
#if defined(__x86_64__)
        case Isa::avx2: return linear_avx2;
        case Isa::avxvnni: return linear_avxvnni;
        case Isa::avx512vnni: return linear_avx512vnni;
#elif defined(__aarch64__)
        case Isa::neon: return linear_neon;
        case Isa::neon_dotprod: return linear_neon_dotprod;
        case Isa::neon_i8mm: return linear_neon_i8mm;
#endif
        default: return linear_scalar;
    }
}

namespace {

// linears, and after each piece done(y, w, row0, row1, t0, t1) where it has been written.
template <class Done>
void multiply(const float* x, int64_t tokens, const Matrix* ws, int count, float* const* ys, Done&& done) {
    if (tokens == 0 || count == 0) return;
    const LinearKernels& kernels = linear_kernels();
    const bool few = tokens <= few_tokens;  // for these gemv is faster, too: it has no tile to make ready
    const Activations plain = {x, nullptr, nullptr, nullptr, nullptr, tokens, ws[0].in, 0, 0};
    const int64_t piece_nbytes = few ? gemv_piece_nbytes(ws, count) : 0;

    if (int(scratch.size()) < count) scratch.resize(count);
    std::vector<Job> jobs(count);
    size_t used = 0;
    int row_pieces = 0;
    for (int i = 0; i < count; i++) {
        const Matrix& w = ws[i];
        assert(w.in == ws[0].in);
        Order order = few ? gemv_order(w) : Order::natural;
        Job& job = jobs[i];
        job.w = &w;
        job.a = multiplies_codes(w) ? quantized_for(w, order, x, tokens, used) : &plain;
        job.y = ys[i];
        job.rows = few ? round_up(1 + piece_nbytes / int64_t(row_nbytes(w)), 4) : kernels.gemm_rows;  // gemv: fours
        job.row_pieces = int((w.out + job.rows - 1) / job.rows);
        job.first_piece = row_pieces;
        row_pieces += job.row_pieces;
    }
    const int64_t block = few ? tokens : gemm_tokens(tokens, row_pieces);
    const int token_pieces = int((tokens + block - 1) / block);
    parallel_for(row_pieces * token_pieces, [&](int piece) {
        int i = count - 1;
        while (jobs[i].first_piece * token_pieces > piece) i--;
        const Job& job = jobs[i];
        const int at = piece - job.first_piece * token_pieces;
        const int64_t row0 = at % job.row_pieces * job.rows, row1 = std::min(job.w->out, row0 + job.rows);
        const int64_t t0 = at / job.row_pieces * block, t1 = std::min(tokens, t0 + block);
        (few ? kernels.gemv : kernels.gemm)(*job.w, *job.a, row0, row1, t0, t1, job.y, job.w->out);
        done(job.y, *job.w, row0, row1, t0, t1);
    });
}

bool all_finite(const float* x, int64_t n) {
    constexpr uint32_t exponent = 0x7f800000;  // all of its bits are set in what is infinite or not a number
    uint32_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        found |= (bits & exponent) == exponent;
    }
    return !found;
}

}  // namespace

void linears(const float* x, int64_t tokens, const Matrix* ws, int count, float* const* ys) {
    multiply(x, tokens, ws, count, ys, [](const float*, const Matrix&, int64_t, int64_t, int64_t, int64_t) {});
}

bool read_out(const float* x, int64_t tokens, const Matrix& w, float* y) {
    std::atomic<bool> finite{true};
    auto check = [&](const float* to, const Matrix&, int64_t row0, int64_t row1, int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t++)
            if (!all_finite(to + t * w.out + row0, row1 - row0)) finite = false;
    };
    multiply(x, tokens, &w, 1, &y, check);
    return finite;
}

// --- embedding -------------------------------------------------------------------------------------------------------

namespace {

void dequantize_row(const Matrix& w, int64_t row, float* y) {
    const auto* codes = static_cast<const uint8_t*>(w.data) + row * int64_t(row_nbytes(w));
    const int64_t groups = w.in / w.group;
    for (int64_t g = 0; g < groups; g++) dequantize_group(w, codes, g, row * groups + g, y + g * w.group);
}

}  // namespace

void embed(const Matrix& table, const int32_t* ids, int64_t count, float* y) {
    auto row = [&](int64_t i) {
        float* out = y + i * table.in;
        if (table.bits) return dequantize_row(table, ids[i], out);
        for (int64_t c = 0; c < table.in; c++) out[c] = value_at(table.data, table.type, ids[i] * table.in + c);
    };
    const int64_t piece = 8;
    parallel_for(int((count + piece - 1) / piece), [&](int p) {
        for (int64_t i = p * piece; i < std::min(count, (p + 1) * piece); i++) row(i);
    });
}

}  // namespace edgeq
