//! How a command fails: the exit code says whether the input or something else was to blame.

use std::fmt;

/// A failure with its exit code.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Bad usage or input: exit code 2.
    Input(anyhow::Error),
    /// Anything else: exit code 1.
    Other(anyhow::Error),
}

impl Failure {
    /// The caller's input is to blame.
    pub(crate) fn input(error: impl Into<anyhow::Error>) -> Self {
        Self::Input(error.into())
    }

    /// Something else is to blame.
    pub(crate) fn other(error: impl Into<anyhow::Error>) -> Self {
        Self::Other(error.into())
    }

    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Input(_) => 2,
            Self::Other(_) => 1,
        }
    }

    pub(crate) fn is_closed_pipe(&self) -> bool {
        let (Self::Input(error) | Self::Other(error)) = self;
        error.chain().any(|e| {
            e.downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
        })
    }
}

/// One paragraph: every cause once, hints last.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Input(error) | Self::Other(error)) = self;
        let (mut causes, mut hints) = (Vec::<String>::new(), Vec::<String>::new());
        for cause in error.chain() {
            for line in cause.to_string().lines() {
                let list = if line.starts_with("hint: ") {
                    &mut hints
                } else {
                    &mut causes
                };
                // Errors that print their source would say it twice.
                if !list.iter().any(|seen| seen.contains(line)) {
                    list.push(line.to_string());
                }
            }
        }
        write!(f, "{}", causes.join(": "))?;
        hints.iter().try_for_each(|hint| write!(f, "\n{hint}"))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn causes_are_joined_and_hints_come_last() {
        let f = Failure::input(anyhow!("no such file\nhint: look again").context("while loading `x`"));
        assert_eq!(f.to_string(), "while loading `x`: no such file\nhint: look again");
        assert_eq!(f.code(), 2);
    }
}
