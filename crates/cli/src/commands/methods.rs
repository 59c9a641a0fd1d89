//! `antefix methods`: what a request can choose, and what always runs.

use antefix_attention::method::{Axis, Card, card_json, find};
use antefix_papers::{ALL, ALWAYS, TRAINED};

use super::{json_line, line};
use crate::failure::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this method, with all there is to say of it
    name: Option<String>,
    /// JSON, one object a line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let cards: Vec<&Card> = match &args.name {
        Some(name) => match ALWAYS.iter().chain(TRAINED).find(|card| card.name == name) {
            Some(card) => vec![card],
            None => vec![find(ALL, name).map_err(Failure::input)?.card()],
        },
        None => ALL
            .iter()
            .map(|m| m.card())
            .chain(ALWAYS.iter().chain(TRAINED).copied())
            .collect(),
    };
    if args.json {
        return cards.into_iter().try_for_each(|card| json_line(&card_json(card)));
    }
    if args.name.is_some() {
        return cards.into_iter().try_for_each(describe);
    }
    let width = cards.iter().map(|c| c.name.len()).max().unwrap_or(0);
    for card in cards {
        line(format_args!(
            "{:width$}  {:9}  {}",
            card.name,
            card.axis.name(),
            card.summary
        ))?;
    }
    line("\nantefix methods NAME says more; --method NAME[,knob=value...] chooses one")
}

fn describe(card: &Card) -> Result<(), Failure> {
    let paper = &card.paper;
    line(format_args!("{} ({})\n{}", card.title, card.name, card.summary))?;
    match card.axis {
        Axis::Execution => line("axis    none: it always runs")?,
        Axis::Training => line("axis    none: it is trained, see docs/training.md")?,
        axis => line(format_args!("axis    {axis}"))?,
    }
    line(format_args!(
        "exact   {}",
        if card.exact { "yes, bit for bit" } else { "no" }
    ))?;
    if card.query_dependent {
        line("keeps   what matters for the question at hand: nothing of it serves the next question")?;
    }
    line(format_args!(
        "paper   {}: {}, {}, {}",
        paper.authors, paper.title, paper.year, paper.reference
    ))?;
    for k in card.knobs {
        let unit = if k.unit.is_empty() {
            String::new()
        } else {
            format!(" {}", k.unit)
        };
        line(format_args!(
            "\n  {} = {}\n      {} ({}{unit}; default from: {})",
            k.name,
            k.default,
            k.help,
            k.kind.range(),
            k.source
        ))?;
    }
    Ok(())
}
