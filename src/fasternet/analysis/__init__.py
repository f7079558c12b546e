"""The studies: approximation (Table 2), redundancy (Fig. 3), receptive field and salience (Figs. 5, 6), ablation."""
