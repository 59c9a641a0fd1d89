//! The `.ts` text format of the UEA and UCR archives: labelled series of one or more channels, of any lengths.
//!
//! Lines that begin with `#` are comments, lines that begin with `@` are the header, which ends with `@data`. After it every line is one
//! series: channels separated by `:`, values by `,`, and at the end the class. Missing values are `?`.

use std::collections::BTreeMap;

/// Most values of a file.
const MOST: usize = 1 << 28;

/// One labelled series.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Values, `[N, channels]`.
    pub values: Vec<f32>,
    /// Index of its class in [`TsFile::classes`].
    pub class: usize,
}

/// A file's series.
#[derive(Debug, Clone, PartialEq)]
pub struct TsFile {
    /// Values of a token.
    pub channels: usize,
    /// Names of the classes, as the header has them.
    pub classes: Vec<String>,
    /// The series.
    pub series: Vec<Series>,
}

/// Why a text is no such file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct TsError {
    /// Which line, from 1; 0: the end of the file.
    pub line: usize,
    /// What is wrong there.
    pub what: String,
}

impl TsFile {
    /// Reads a file's text.
    ///
    /// # Errors
    /// With the first line that is wrong.
    pub fn parse(text: &str) -> Result<Self, TsError> {
        let mut classes: Option<BTreeMap<String, usize>> = None;
        let mut names = Vec::new();
        let mut file = Self {
            channels: 0,
            classes: Vec::new(),
            series: Vec::new(),
        };
        let (mut in_data, mut values) = (false, 0usize);
        for (i, line) in text.lines().enumerate() {
            let at = |what: String| TsError { line: i + 1, what };
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(header) = line.strip_prefix('@') {
                if in_data {
                    return Err(at(format!("`@{}` behind `@data`", short(header))));
                }
                let mut words = header.split_whitespace();
                match words.next().unwrap_or("").to_lowercase().as_str() {
                    "data" => in_data = true,
                    "timestamps" if words.next() == Some("true") => {
                        return Err(at("series with time stamps are not read".into()));
                    }
                    "classlabel" => {
                        if words.next() != Some("true") {
                            return Err(at("series without classes are not read".into()));
                        }
                        names = words.map(str::to_owned).collect();
                        let map: BTreeMap<String, usize> =
                            names.iter().cloned().enumerate().map(|(i, n)| (n, i)).collect();
                        if map.len() != names.len() || names.is_empty() {
                            return Err(at("`@classLabel true` must be followed by different names".into()));
                        }
                        classes = Some(map);
                    }
                    _ => {}
                }
                continue;
            }
            if !in_data {
                return Err(at(format!("`{}` before `@data`", short(line))));
            }
            let classes = classes
                .as_ref()
                .ok_or_else(|| at("there was no `@classLabel` in the header".into()))?;
            let (channels, class) = line
                .rsplit_once(':')
                .ok_or_else(|| at("a series without a class: it has no `:`".into()))?;
            let class = *classes
                .get(class.trim())
                .ok_or_else(|| at(format!("`{}` is no class of the header", short(class))))?;
            let columns = channels
                .split(':')
                .map(|channel| column(channel).map_err(&at))
                .collect::<Result<Vec<_>, _>>()?;
            let n = columns[0].len();
            if columns.iter().any(|c| c.len() != n) {
                return Err(at("its channels are of different lengths".into()));
            }
            if file.channels == 0 {
                file.channels = columns.len();
            }
            if columns.len() != file.channels {
                return Err(at(format!(
                    "{} channels, the series before had {}",
                    columns.len(),
                    file.channels
                )));
            }
            values += n * columns.len();
            if values > MOST {
                return Err(at(format!("more than {MOST} values")));
            }
            let rows = (0..n).flat_map(|t| columns.iter().map(move |c| c[t]));
            file.series.push(Series {
                values: rows.collect(),
                class,
            });
        }
        if file.series.is_empty() {
            return Err(TsError {
                line: 0,
                what: "there are no series".into(),
            });
        }
        file.classes = names;
        Ok(file)
    }

    /// Tokens of series `i`.
    pub fn len_of(&self, i: usize) -> usize {
        self.series[i].values.len() / self.channels
    }
}

fn column(text: &str) -> Result<Vec<f32>, String> {
    let values = text.split(',').map(|value| {
        let value = value.trim();
        if value == "?" {
            return Err("missing values are not read".to_owned());
        }
        match value.parse::<f32>() {
            Ok(x) if x.is_finite() => Ok(x),
            _ => Err(format!("`{}` is no number", short(value))),
        }
    });
    values.collect()
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "# a comment\n@problemName P\n@timeStamps false\n@classLabel true a b\n@data\n1,2,3:4,5,6:b\n7:8:a\n";

    #[test]
    fn series_of_different_lengths_are_read_token_by_token() {
        let file = TsFile::parse(TEXT).unwrap();
        assert_eq!((file.channels, file.classes.len(), file.series.len()), (2, 2, 2));
        assert_eq!(file.series[0].values, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!((file.series[0].class, file.len_of(0), file.len_of(1)), (1, 3, 1));
    }

    #[test]
    fn broken_files_are_refused_with_the_line() {
        for (from, to, want) in [
            (
                "1,2,3:4,5,6:b",
                "1,2,3:4,5:b",
                "line 6: its channels are of different lengths",
            ),
            ("7:8:a", "7:8:c", "line 7: `c` is no class"),
            ("7:8:a", "7:a", "line 7: 1 channels, the series before had 2"),
            ("7:8:a", "x:8:a", "line 7: `x` is no number"),
            ("7:8:a", "1e99:8:a", "line 7: `1e99` is no number"),
            ("7:8:a", "?:8:a", "line 7: missing values"),
            ("7:8:a", "78a", "line 7: a series without a class"),
            ("7:8:a", "@data", "line 7: `@data` behind `@data`"),
            (
                "@timeStamps false",
                "@timeStamps true",
                "line 3: series with time stamps",
            ),
            ("true a b", "false", "line 4: series without classes"),
            ("true a b", "true a a", "line 4: `@classLabel true` must be"),
            ("@data\n", "", "line 5: `1,2,3:4,5,6:b` before `@data`"),
            ("@classLabel true a b\n", "", "line 5: there was no `@classLabel`"),
            ("1,2,3:4,5,6:b\n7:8:a\n", "", "line 0: there are no series"),
        ] {
            let text = TEXT.replace(from, to);
            assert_ne!(text, TEXT);
            let error = TsFile::parse(&text).unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
    }
}
