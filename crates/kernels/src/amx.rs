//! AMX: asking the kernel for the tile registers, and giving them shapes.

/// Whether the CPU has int8 and bf16 tiles and Linux lets this process use them. Asked once per process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) fn permitted() -> bool {
    use std::sync::OnceLock;
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        // CPUID leaf 7: EDX bit 24 AMX-TILE, bit 25 AMX-INT8, bit 22 AMX-BF16.
        if std::arch::x86_64::__cpuid(0).eax < 7 {
            return false;
        }
        let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
        const NEEDED: u32 = 1 << 24 | 1 << 25 | 1 << 22;
        if edx & NEEDED != NEEDED {
            return false;
        }
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: arch_prctl with these arguments only changes this process's permission bits.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    })
}

/// No tiles outside Linux on x86-64.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[allow(dead_code)]
pub(crate) fn permitted() -> bool {
    false
}

/// Shape of a tile register: up to 16 rows of up to 64 bytes.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct TileShape {
    /// Rows.
    pub(crate) rows: u8,
    /// Bytes of a row.
    pub(crate) bytes: u16,
}

/// Gives the eight tile registers of this thread their shapes and clears them.
///
/// # Safety
/// The CPU has AMX, this process may use it ([`permitted`]), and shapes are within 16 rows of 64 bytes.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn configure(shapes: &[TileShape; 8]) {
    /// What `ldtilecfg` reads.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    for (i, shape) in shapes.iter().enumerate() {
        config.row_bytes[i] = shape.bytes;
        config.rows[i] = shape.rows;
    }
    // SAFETY: the instruction reads the 64 bytes of `config` (the block may read memory: no `nomem`) and clears the tiles.
    unsafe {
        std::arch::asm!(
            "ldtilecfg [{0}]",
            in(reg) &raw const config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Gives the tile registers back, so that the kernel need not save them.
///
/// # Safety
/// The CPU has AMX and this process may use it.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn release() {
    // SAFETY: touches only the tiles.
    unsafe {
        std::arch::asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, nomem),
        );
    }
}

/// `rounds` times four products of full tiles of zeros, of bf16 or of int8: what they cost is what [`crate::probe`] measures.
///
/// # Safety
/// As [`configure`].
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn products(bf16: bool, rounds: usize) {
    macro_rules! rounds {
        ($op:literal) => {
            std::arch::asm!(
                "2:",
                concat!($op, " tmm0, tmm4, tmm5"),
                concat!($op, " tmm1, tmm4, tmm5"),
                concat!($op, " tmm2, tmm4, tmm5"),
                concat!($op, " tmm3, tmm4, tmm5"),
                "dec {n}",
                "jnz 2b",
                n = inout(reg) rounds.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem),
            )
        };
    }
    // SAFETY: the caller's promise; only the tiles are touched.
    unsafe {
        configure(&[TileShape { rows: 16, bytes: 64 }; 8]);
        if bf16 {
            rounds!("tdpbf16ps");
        } else {
            rounds!("tdpbssd");
        }
        release();
    }
}
