// The matrix unit: products of 16 x 32 by 32 x 16 bfloat16 numbers.

#include "tiles.inl"

namespace iqtorch { namespace IQTORCH_ISA {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

class AmxUnit {
 public:
  static constexpr int kPanelColumns = 512;  // 32 KiB of weights
  static constexpr int kChunkRows = 512;     // rows of activations per pass: with the results below, half of a 2 MiB cache
  static constexpr int kChunkPairs = 16;     // 512 rows of weights

  AmxUnit() {
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.column_bytes[i] = 64, config.rows[i] = 16;
    _tile_storeconfig(&before_);  // another library may rely on what it set up in this thread
    _tile_loadconfig(&config);
  }
  ~AmxUnit() {
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }

  // Tile registers 0 .. 3 hold 32 x 32 results, 4 and 5 activations, 6 and 7 weights.
  void multiply(const uint16_t* x, int64_t, const uint16_t* panel, int64_t cells, float* result, bool first) const {
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, result, 64);
      _tile_loadd(1, result + 256, 64);
      _tile_loadd(2, result + 512, 64);
      _tile_loadd(3, result + 768, 64);
    }
    for (int64_t c = 0; c < cells; ++c, x += 2 * kTile, panel += 2 * kTile) {
      _tile_stream_loadd(4, x, 64);
      _tile_loadd(6, panel, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, x + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, result, 64);
    _tile_stored(1, result + 256, 64);
    _tile_stored(2, result + 512, 64);
    _tile_stored(3, result + 768, 64);
  }

 private:
  TileConfig before_;
};

}}  // namespace iqtorch::IQTORCH_ISA
