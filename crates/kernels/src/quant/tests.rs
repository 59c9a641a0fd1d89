//! Blocks made by hand, with values worked out on paper.

use super::*;

fn values(format: Format, block: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; format.block_len()];
    dequantise(format, block, &mut out).unwrap();
    out
}

fn f16(v: f32) -> [u8; 2] {
    half::f16::from_f32(v).to_le_bytes()
}

#[test]
fn plain_floats() {
    assert_eq!(values(Format::F32, &1.5f32.to_le_bytes()), [1.5]);
    assert_eq!(values(Format::F16, &[0x00, 0xc0]), [-2.0]);
    assert_eq!(values(Format::BF16, &[0x80, 0x3f]), [1.0]);
}

#[test]
fn blocks_of_32() {
    // Low nibble of byte j is value j, high nibble value j + 16.
    let mut q = [0u8; 16];
    q[0] = 0xf1;
    q[15] = 0x2e;
    let v = values(Format::Q4_0, &[&f16(0.5)[..], &q].concat());
    assert_eq!((v[0], v[16], v[15], v[31], v[1]), (-3.5, 3.5, 3.0, -3.0, -4.0));
    let v = values(Format::Q4_1, &[&f16(0.5)[..], &f16(-1.0), &q].concat());
    assert_eq!((v[0], v[16], v[15], v[31], v[1]), (-0.5, 6.5, 6.0, 0.0, -1.0));
    // Fifth bits of values 0 and 31.
    let high = 0x8000_0001u32.to_le_bytes();
    let v = values(Format::Q5_0, &[&f16(2.0)[..], &high, &q].concat());
    assert_eq!((v[0], v[16], v[31], v[1]), (2.0, -2.0, 4.0, -32.0));
    let v = values(Format::Q5_1, &[&f16(2.0)[..], &f16(3.0), &high, &q].concat());
    assert_eq!((v[0], v[16], v[31], v[1]), (37.0, 33.0, 39.0, 3.0));
    let mut w = [0u8; 32];
    w[0] = 0x80;
    w[31] = 0x7f;
    let v = values(Format::Q8_0, &[&f16(0.25)[..], &w].concat());
    assert_eq!((v[0], v[31], v[1]), (-32.0, 31.75, 0.0));
}

#[test]
fn q4_k_and_q5_k() {
    // Scale j of the first four: low 6 bits of byte j; minimum: byte j + 4. Of the last four: nibbles of byte j + 4, and the top
    // two bits of bytes j - 4 and j.
    let mut s = [0u8; 12];
    s[0] = 3 | (1 << 6); // scale 0 = 3, scale 4 gets + 16
    s[4] = 5 | (2 << 6); // minimum 0 = 5, minimum 4 gets + 32
    s[8] = 0x21; // scale 4 = 16 + 1, minimum 4 = 32 + 2
    let mut q = [0u8; 128];
    q[0] = 0x0f; // value 0 = 15, value 32 = 0
    q[64] = 0x07; // value 128 = 7, in group 4
    let v = values(Format::Q4_K, &[&f16(0.5)[..], &f16(0.25), &s, &q].concat());
    assert_eq!((v[0], v[1]), (1.5 * 15.0 - 1.25, -1.25));
    assert_eq!((v[128], v[129], v[32]), (8.5 * 7.0 - 8.5, -8.5, 0.0));
    let mut high = [0u8; 32];
    high[0] = 1 | (1 << 4); // fifth bits of values 0 and 128
    let v = values(Format::Q5_K, &[&f16(0.5)[..], &f16(0.25), &s, &high, &q].concat());
    assert_eq!((v[0], v[1]), (1.5 * 31.0 - 1.25, -1.25));
    assert_eq!((v[128], v[129], v[32]), (8.5 * 23.0 - 8.5, -8.5, 0.0));
}

#[test]
fn q2_k() {
    let mut s = [0u8; 16];
    s[0] = 0x23; // values 0..16: scale 3, minimum 2
    s[3] = 0x01; // values 48..64: scale 1
    s[8] = 0x10; // values 128..144: minimum 1
    let mut q = [0u8; 64];
    q[0] = 0b0011; // value 0 = 3
    q[16] = 0b1000; // value 48 = 2
    let v = values(Format::Q2_K, &[&s[..], &q, &f16(0.5), &f16(0.25)].concat());
    assert_eq!(
        (v[0], v[1], v[48], v[49], v[128], v[144]),
        (4.0, -0.5, 1.0, 0.0, -0.25, 0.0)
    );
}

#[test]
fn q3_k() {
    let mut high = [0u8; 32];
    high[0] = 1 | (1 << 4); // values 0 and 128 lose no 4
    let mut q = [0u8; 64];
    q[0] = 3;
    q[32] = 2;
    let mut s = [0u8; 12];
    s[0] = 0x51; // low bits of scale 0: 1, of scale 8: 5
    s[8] = 0b10_0011; // high bits of scale 0: 3, of scale 8: 2
    let v = values(Format::Q3_K, &[&high[..], &q, &s, &f16(0.5)].concat());
    // Scale 0 = 49 - 32, scale 8 = 37 - 32, all others -32.
    assert_eq!(
        (v[0], v[1], v[128], v[129], v[16]),
        (8.5 * 3.0, 8.5 * -4.0, 2.5 * 2.0, -10.0, 64.0)
    );
}

#[test]
fn q6_k() {
    let mut low = [0u8; 128];
    low[0] = 0xf1;
    low[32] = 0x02;
    low[64] = 0x30;
    let mut high = [0u8; 64];
    high[0] = 0b11_10_01_00;
    let mut s = [1u8; 16];
    s[2] = 0xff;
    s[8] = 3;
    let v = values(Format::Q6_K, &[&low[..], &high, &s, &f16(0.5)].concat());
    assert_eq!(
        (v[0], v[32], v[64], v[96]),
        (
            -15.5,
            -0.5 * (18.0 - 32.0),
            0.5 * (47.0 - 32.0),
            0.5 * (48.0 - 32.0)
        )
    );
    assert_eq!((v[128], v[192], v[1]), (-48.0, -0.5 * 29.0, -16.0));
}

#[test]
fn sizes_are_checked() {
    for format in Format::ALL {
        let (len, bytes) = (format.block_len(), format.block_bytes());
        assert_eq!(format.row_bytes(3 * len), Some(3 * bytes));
        assert!(len == 1 || format.row_bytes(len + 1).is_none());
        assert!(dequantise(format, &vec![0; bytes + 1], &mut vec![0.0; len]).is_err());
        assert!(Format::ALL.contains(&format) && format.to_string() == format.name());
    }
    assert_eq!(Format::F32.row_bytes(usize::MAX), None);
    let known = (0..64).filter_map(Format::from_ggml_type).collect::<Vec<_>>();
    assert_eq!(known, Format::ALL);
    assert_eq!(Format::from_ggml_type(9), None);
}
