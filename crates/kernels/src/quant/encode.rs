//! From f32 to the formats that lose little: what trained weights are written in.

use half::{bf16, f16};

use super::Format;

/// `values` in `format`: F32, F16, BF16 or Q8_0, whose rows are whole blocks of 32. `None` for other formats, and for values that are not whole blocks.
pub fn quantise(format: Format, values: &[f32]) -> Option<Vec<u8>> {
    if !values.len().is_multiple_of(format.block_len()) {
        return None;
    }
    Some(match format {
        Format::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Format::F16 => values
            .iter()
            .flat_map(|&x| f16::from_f32(x).to_le_bytes())
            .collect(),
        Format::BF16 => values
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect(),
        Format::Q8_0 => values.chunks_exact(32).flat_map(block).collect(),
        _ => return None,
    })
}

/// One f16 scale, the largest magnitude over 127, and 32 integers.
fn block(values: &[f32]) -> Vec<u8> {
    let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let inverse = match scale.to_f32() {
        0.0 => 0.0,
        s => 1.0 / s,
    };
    let mut out = scale.to_le_bytes().to_vec();
    out.extend(
        values
            .iter()
            .map(|x| (x * inverse).round().clamp(-127.0, 127.0) as i8 as u8),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::dequantise;

    #[test]
    fn what_is_written_reads_back_within_half_a_step() {
        let values: Vec<f32> = (0..96)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0)
            .chain([0.0; 32])
            .collect();
        for (format, far) in [
            (Format::F32, 0.0),
            (Format::F16, 4e-3),
            (Format::BF16, 4e-2),
            (Format::Q8_0, 50.0 / 7.0 / 127.0 * 0.51),
        ] {
            let bytes = quantise(format, &values).unwrap();
            assert_eq!(bytes.len(), format.row_bytes(values.len()).unwrap());
            let mut back = vec![0.0; values.len()];
            dequantise(format, &bytes, &mut back).unwrap();
            for (a, b) in values.iter().zip(&back) {
                assert!((a - b).abs() <= far, "{format:?}: {a} {b}");
            }
        }
        assert_eq!(quantise(Format::Q8_0, &values[..33]), None);
        assert_eq!(quantise(Format::Q4_K, &values), None);
    }
}
