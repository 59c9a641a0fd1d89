//! `antefix doctor`: what this machine can do.

use antefix_kernels::cpu::{Cpu, Path};
use antefix_kernels::{probe, team::Team};
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{cpu, threads};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Threads; default: all cores
    #[arg(short = 't', long)]
    threads: Option<usize>,
    /// JSON
    #[arg(long)]
    json: bool,
}

/// Value of the first line `key : value` of a /proc file.
fn proc(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// The processor's name.
pub(crate) fn processor() -> String {
    proc("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into())
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let cpu = cpu()?;
    let threads = threads(args.threads)?;
    let team = Team::new(threads);
    let ceilings = probe::measure(cpu, &team);
    let name = processor();
    let memory = proc("/proc/meminfo", "MemTotal").unwrap_or_else(|| "unknown".into());
    let here: Vec<&str> = Cpu::available().iter().map(|c| c.path().name()).collect();
    let absent: Vec<&str> = Path::ALL
        .iter()
        .filter(|&&p| Cpu::with(p).is_none())
        .map(|p| p.name())
        .collect();
    let (read, flop, int8) = (
        ceilings.read_bytes_s / 1e9,
        ceilings.f32_flop_s / 1e9,
        ceilings.int8_op_s / 1e9,
    );
    if args.json {
        return json_line(&json!({
            "cpu": name,
            "memory": memory,
            "threads": threads,
            "path": cpu.path().name(),
            "paths": here,
            "absent": absent,
            "read_gb_s": read,
            "f32_gflop_s": flop,
            "int8_gop_s": int8,
            "tile_int8_gop_s": ceilings.tiles.map(|t| t.int8_op_s / 1e9),
            "tile_bf16_gflop_s": ceilings.tiles.map(|t| t.bf16_flop_s / 1e9),
        }));
    }
    line(format_args!(
        "processor  {name}, {threads} threads used, memory {memory}"
    ))?;
    line(format_args!(
        "kernels    {} (here: {}; not here: {})",
        cpu.path(),
        here.join(", "),
        absent.join(", ")
    ))?;
    let tiles = ceilings.tiles.map_or(String::new(), |t| {
        format!(
            "; tiles: int8 {:.0} Gop/s, bf16 {:.0} GFLOP/s",
            t.int8_op_s / 1e9,
            t.bf16_flop_s / 1e9
        )
    });
    line(format_args!(
        "ceilings   read {read:.1} GB/s, f32 {flop:.0} GFLOP/s, int8 {int8:.0} Gop/s{tiles}"
    ))
}
